"""TRL's own trainers on the shared base."""
