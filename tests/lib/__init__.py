"""What several tests use, imported as lib.NAME. Nothing here is a test; fixtures are in conftest.py."""
