"""Each module of the package has a file of tests of its name, in the folder of its package's name."""

from pathlib import Path

import tartapefs

PACKAGE, TESTS = Path(tartapefs.__file__).parent, Path(__file__).parent


def test_each_module_has_a_file_of_tests() -> None:
    modules = {place.relative_to(PACKAGE) for place in PACKAGE.rglob("*.py")}
    wanted = {
        place.parent / f"test_{place.name}" for place in modules if len(place.parts) > 1 and place.stem != "__init__"
    }
    found = {place.relative_to(TESTS) for place in TESTS.rglob("test_*.py")}
    assert {str(place) for place in wanted - found} == set()
