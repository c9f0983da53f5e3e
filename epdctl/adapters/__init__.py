"""What a rank runs. One module per engine; ``make_plan`` is how the rest of epdctl gets a Plan."""

from epdctl.adapters.planning import ADAPTERS, Found, make_plan

__all__ = ["ADAPTERS", "Found", "make_plan"]
