"""The shelf of a catalog: what has not changed is not made again."""

from __future__ import annotations

from agent.base.config import ModelConfig
from agent.operations.shelving import Shelves
from agent.store.document import CatalogDocument, ModelEntry
from tests.operations.test_batching import entry


def document(**models: str) -> CatalogDocument:
    found = {name: ModelEntry(active=active, versions={"1.0.0": entry()}) for name, active in models.items()}
    return CatalogDocument(generation=1, saved_at="2026-01-01T00:00:00Z", models=found)


def test_only_what_has_changed_is_made_again() -> None:
    shelf = Shelves(lambda ref: None, 1).shelf
    first = document(a="1.0.0", b="1.0.0", c="1.0.0")
    before = shelf(first).versions
    changed = first.model_copy(update={"models": {**first.models, "b": document(b="1.0.0").models["b"]}})
    after = shelf(changed).versions
    assert [after[name, "1.0.0"] is before[name, "1.0.0"] for name in "abc"] == [True, False, True]

    wished = shelf(changed, {"a": ModelConfig(governed=False)}).versions
    assert [wished[name, "1.0.0"] is after[name, "1.0.0"] for name in "abc"] == [False, True, True]
    assert not wished["a", "1.0.0"].governed

    left = changed.model_copy(update={"models": {"c": changed.models["c"].model_copy(update={"active": None})}})
    last = shelf(left)
    assert last.versions == {("c", "1.0.0"): wished["c", "1.0.0"]}
    assert last.active == {}


def test_a_wish_for_the_name_in_the_manifest_counts_where_it_is_installed_under_another() -> None:
    shelf = Shelves(lambda ref: None, 1).shelf
    of = document(other="1.0.0")
    name = of.models["other"].versions["1.0.0"].manifest.name
    assert name != "other"
    before = shelf(of).versions["other", "1.0.0"]
    after = shelf(of, {name: ModelConfig(batching=False)})
    assert after.versions["other", "1.0.0"] is not before
