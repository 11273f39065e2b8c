"""`python -m bulkhead`: the command line, in this process."""

from bulkhead.cli.main import direct

if __name__ == "__main__":
    direct()
