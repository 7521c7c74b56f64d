"""`python -m kiloq` and the `kiloq` script."""

import sys


def main() -> None:
    from kiloq.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
