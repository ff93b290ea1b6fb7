# SPDX-License-Identifier: Apache-2.0
"""`python -m eigenprune.cli`, the same as the command `eigenprune`."""

from eigenprune.cli import main

if __name__ == "__main__":
    main()
