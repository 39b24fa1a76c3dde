"""`python -m gptk VERB` is `gptk VERB`."""

import sys

from gptk.cli import main

if __name__ == "__main__":
    sys.exit(main())
