"""`python -m detent`: the command line."""

from detent.cli import app

if __name__ == "__main__":
    app(prog_name="detent")
