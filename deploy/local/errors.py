"""What may stop a launch, said in one sentence."""


class LaunchError(Exception):
    """The mesh cannot start or go on; the text is one sentence for the operator."""
