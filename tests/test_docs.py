"""The contract's document names tests; a name that no test has would be a promise that nothing holds."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_contract_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (TESTS.parent / "docs" / "semantics.md").read_text()))
    sources = {path.stem: path.read_text() for path in TESTS.glob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources.values()), re.MULTILINE))
    assert len(named) > 40
    assert named <= defined | set(sources)
