"""``python -m epdctl`` is the command ``epdctl``."""

from epdctl.cli.main import main

if __name__ == "__main__":
    main()
