"""REINFORCE++: advantages normalised over the batch, without a critic."""
