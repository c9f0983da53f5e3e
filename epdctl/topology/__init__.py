"""From the YAML people write to the frozen Plan that runs.

Nothing is imported here: ``plan`` is read by processes that never parse a topology and should not pay for pydantic.
"""
