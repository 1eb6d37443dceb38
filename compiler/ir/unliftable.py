"""The signal between lifting rows and `Lift`."""


class Unliftable(Exception):
    """This op at this index has no exact expression; the node becomes a capture."""
