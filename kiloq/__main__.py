"""`python -m kiloq` and the `kiloq` script."""

import os
import sys


def main() -> None:
    from kiloq.cli.main import run

    code = run(sys.argv[1:])
    if "RANK" in os.environ:  # one of several that torchrun started
        from kiloq.cli.terminal import end_process

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
