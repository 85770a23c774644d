"""The database of the registry, whichever it is."""

from __future__ import annotations

from alembic.config import Config
from alembic.script import ScriptDirectory

from pollard.services.models.database import newest_schema


def test_migrations_follow_one_another() -> None:
    """Two that were made side by side need an order."""
    config = Config()
    config.set_main_option("script_location", "pollard.services.models:migrations")
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert len(scripts.get_heads()) == 1
    names = [script.revision for script in scripts.walk_revisions()]
    assert names == sorted(names, reverse=True)
    assert newest_schema() == scripts.get_current_head()
