"""Each module of the package has a file of tests of its name, in the folder of its package's name."""

from pathlib import Path

import tartapefs

PACKAGE, TESTS = Path(tartapefs.__file__).parent, Path(__file__).parent
MISSING = {  # a module that is tested by other files; add none
    "api/test_tape.py",
    "archive/test_member.py",
    "base/test_errors.py",
    "base/test_signals.py",
    "index/test_connections.py",
    "index/test_page.py",
    "index/test_schema.py",
    "index/test_writer.py",
    "play/test_assemble.py",
    "play/test_descriptor_cache.py",
    "play/test_events.py",
    "play/test_thread_pool.py",
    "source/test_exclusion.py",
    "source/test_file_systems.py",
    "source/test_folder.py",
    "source/test_leases.py",
    "source/test_system_calls.py",
}


def test_each_module_has_a_file_of_tests() -> None:
    modules = {place.relative_to(PACKAGE) for place in PACKAGE.rglob("*.py")}
    wanted = {
        place.parent / f"test_{place.name}" for place in modules if len(place.parts) > 1 and place.stem != "__init__"
    }
    found = {place.relative_to(TESTS) for place in TESTS.rglob("test_*.py")}
    assert {str(place) for place in wanted - found} <= MISSING
