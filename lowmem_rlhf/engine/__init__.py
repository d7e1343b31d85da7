"""What runs a model: the shared base and its roles, packing, attention, log-probs, adapters, passes."""
