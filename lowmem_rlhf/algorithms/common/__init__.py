"""Mathematics and settings that several algorithms share."""
