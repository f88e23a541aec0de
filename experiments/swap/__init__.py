"""The tasks of experiments.pretrained_swap."""
