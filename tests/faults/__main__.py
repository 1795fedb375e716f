"""Write `docs/faults.md`."""

from tests.faults.page import PAGE, collect, text

collect()
PAGE.write_text(text(), encoding="utf-8")
