from llmq.cli import main
from llmq.terminal import leave


def command() -> None:
    """Run one command as a process of its own, and end it."""
    try:
        leave(main())
    except SystemExit as ended:  # argparse's: --help, and options that it refuses
        leave(ended.code if isinstance(ended.code, int) else bool(ended.code))


if __name__ == "__main__":
    command()
