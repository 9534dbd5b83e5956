"""The one exception type that a person sees: one line that says what is wrong and what to change."""


class DWDPError(ValueError):
    """A setting, machine or peer that DWDP cannot work with; the message is one line."""
