"""Write docs/optimizers.md: `uv run python -m tests.optimizers`."""

from tests.optimizers.page import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} is written.")
