import vlpet_lightning  # noqa: F401  # first: its cure must run before anything imports torchvision
