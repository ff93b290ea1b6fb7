# SPDX-License-Identifier: Apache-2.0
"""`python -m eigenprune`: what is installed here, and what computes each operator."""

from eigenprune.ops.environment import main

if __name__ == "__main__":
    main()
