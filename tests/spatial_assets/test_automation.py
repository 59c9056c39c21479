"""Automation conditions, tick by tick: what is asked for, when, and when not."""

from __future__ import annotations

import dagster as dg
import pytest

from spatial_assets.automation import unchanged_tag

TAR_ASSETS = ["backbone_embeddings", "fingerprints", "intermediates"]
CHAIN = ["difficulty_metadata", "hf_model", "merged_splits", "projector_checkpoint", "retrieval_report"]


def arrive(daemon, *keys: str) -> None:
    """Tars are registered and reported, as the sensor does."""
    daemon.instance.add_dynamic_partitions("tar", list(keys))
    daemon.made("raw_tars", *keys)


def drop(daemon, *keys: str) -> None:
    daemon.instance.add_dynamic_partitions("drop", list(keys))
    daemon.made("packaged_images", *keys)


def all_made(daemon, *keys: str) -> None:
    """Everything of the tars is there, made by hand before the daemon first looks."""
    arrive(daemon, *keys)
    for asset in [*sorted(TAR_ASSETS, key=lambda name: name != "intermediates")]:
        daemon.made(asset, *keys)
    for asset in CHAIN:
        daemon.made(asset)


def run_everything(daemon, requested: dict[str, list[str]]) -> None:
    """Each group of requests runs to its end."""
    by_keys: dict[tuple[str, ...], list[str]] = {}
    for asset, keys in requested.items():
        by_keys.setdefault(tuple(keys), []).append(asset)
    for keys, assets in by_keys.items():
        run = daemon.start(assets, [key for key in keys if key])
        daemon.finish(run, {asset: list(keys) for asset in assets})


def test_an_empty_lake_asks_for_nothing(daemon) -> None:
    assert daemon.decide() == {}
    assert daemon.decide() == {}


def test_a_new_tar_asks_for_its_three_artifacts_once(daemon) -> None:
    daemon.decide()
    arrive(daemon, "0201")
    assert daemon.decide() == {asset: ["0201"] for asset in TAR_ASSETS}
    run = daemon.start(TAR_ASSETS, ["0201"])
    assert daemon.decide() == {}
    daemon.finish(run, {asset: ["0201"] for asset in TAR_ASSETS})
    requested = daemon.decide()
    assert sorted(requested) == CHAIN
    run_everything(daemon, requested)
    assert daemon.decide() == {}
    assert daemon.decide() == {}


def test_keys_that_were_there_before_the_first_look_are_asked_for(daemon) -> None:
    arrive(daemon, "0201", "0202")
    assert daemon.decide() == {asset: ["0201", "0202"] for asset in TAR_ASSETS}


def test_what_is_made_is_left_alone_at_the_first_look(daemon) -> None:
    all_made(daemon, "0201", "0202")
    assert daemon.decide() == {}
    assert daemon.decide() == {}


def test_a_replaced_tar_is_redone_and_no_other(daemon) -> None:
    all_made(daemon, "0201", "0202")
    daemon.decide()
    daemon.made("raw_tars", "0202")
    assert daemon.decide() == {asset: ["0202"] for asset in TAR_ASSETS}


def test_a_tar_replaced_while_it_is_being_read_is_redone_afterwards(daemon) -> None:
    daemon.decide()
    arrive(daemon, "0201")
    daemon.decide()
    run = daemon.start(TAR_ASSETS, ["0201"])
    daemon.made("raw_tars", "0201")
    assert daemon.decide() == {}
    daemon.finish(run, {asset: ["0201"] for asset in TAR_ASSETS})
    assert daemon.decide().get("intermediates") == ["0201"]


def test_a_failed_tar_waits_for_a_change_and_blocks_nobody(daemon) -> None:
    daemon.decide()
    arrive(daemon, "0201", "0202")
    daemon.decide()
    bad = daemon.start(TAR_ASSETS, ["0201"])
    good = daemon.start(TAR_ASSETS, ["0202"])
    daemon.finish(bad, {}, failed=True)
    assert daemon.decide() == {}, "nothing is merged while another tar is being made"
    daemon.finish(good, {asset: ["0202"] for asset in TAR_ASSETS})
    requested = daemon.decide()
    assert sorted(requested) == CHAIN, "the good tar goes on without the bad one"
    run_everything(daemon, requested)
    for _ in range(3):
        assert daemon.decide() == {}, "a failed tar is not tried again and again"
    daemon.made("raw_tars", "0201")
    assert daemon.decide() == {asset: ["0201"] for asset in TAR_ASSETS}


def test_good_keys_of_a_failed_run_go_on(daemon) -> None:
    """A run over two tars records the one it made; what is made from that one follows in the next run."""
    daemon.decide()
    arrive(daemon, "0201", "0202")
    daemon.decide()
    run = daemon.start(TAR_ASSETS, ["0201", "0202"])
    daemon.finish(run, {"intermediates": ["0202"]}, failed=True)
    assert daemon.decide() == {"fingerprints": ["0202"], "backbone_embeddings": ["0202"]}


def test_a_cancelled_run_is_not_started_again(daemon) -> None:
    daemon.decide()
    arrive(daemon, "0201")
    daemon.decide()
    run = daemon.start(TAR_ASSETS, ["0201"])
    daemon.decide()
    daemon.instance.report_run_canceled(run)
    assert [daemon.decide() for _ in range(3)] == [{}, {}, {}]


def test_a_tar_found_unchanged_asks_for_nothing_further(daemon) -> None:
    """Its three artifacts are looked at, because nobody can know before; one that changed after all goes on."""
    all_made(daemon, "0201", "0202")
    daemon.decide()
    daemon.made("raw_tars", "0202")
    for changed in ([], ["fingerprints"]):
        requested = daemon.decide()
        assert requested == {asset: ["0202"] for asset in TAR_ASSETS}
        run = daemon.start(TAR_ASSETS, ["0202"])
        daemon.instance.add_run_tags(
            run.run_id, {unchanged_tag(asset): "true" for asset in TAR_ASSETS if asset not in changed}
        )
        daemon.finish(run, {asset: ["0202"] for asset in TAR_ASSETS})
        if not changed:
            assert [daemon.decide() for _ in range(3)] == [{}, {}, {}]
            daemon.made("raw_tars", "0202")
    assert sorted(daemon.decide()) == [asset for asset in CHAIN if asset != "merged_splits"]


def test_a_change_is_not_hidden_by_a_later_look_at_the_same_key(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    for tags in ({}, {unchanged_tag("backbone_embeddings"): "true"}):
        run = daemon.start(["backbone_embeddings"], ["0201"])
        daemon.instance.add_run_tags(run.run_id, tags)
        daemon.finish(run, {"backbone_embeddings": ["0201"]})
    assert "merged_splits" in daemon.decide()


def test_many_tars_train_once(daemon) -> None:
    keys = [f"{number:04d}" for number in range(1, 9)]
    daemon.decide()
    arrive(daemon, *keys)
    daemon.decide()
    runs = [daemon.start(TAR_ASSETS, keys[start : start + 2]) for start in range(0, 8, 2)]
    for number, run in enumerate(runs):
        assert daemon.decide() == {}, f"asked for something with {number} of 4 runs done"
        daemon.finish(run, dict.fromkeys(TAR_ASSETS, keys[2 * number : 2 * number + 2]))
    requested = daemon.decide()
    assert sorted(requested) == CHAIN
    run_everything(daemon, requested)
    assert [daemon.decide() for _ in range(2)] == [{}, {}]


def test_a_tar_that_arrives_during_training_trains_again_afterwards(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    daemon.made("backbone_embeddings", "0201")
    requested = daemon.decide()
    assert "projector_checkpoint" in requested
    training = daemon.start(list(requested))
    arrive(daemon, "0202")
    tar = daemon.decide()
    assert tar == {asset: ["0202"] for asset in TAR_ASSETS}
    run_everything(daemon, tar)
    meanwhile = daemon.decide()
    assert meanwhile == {"difficulty_metadata": [""]}, "the splits are being read"
    run_everything(daemon, meanwhile)
    assert daemon.decide() == {}
    daemon.finish(training, {asset: [""] for asset in requested})
    assert sorted(daemon.decide()) == [asset for asset in CHAIN if asset != "difficulty_metadata"]


def test_a_drop_before_the_model_waits_for_it(daemon) -> None:
    daemon.decide()
    drop(daemon, "march")
    assert daemon.decide() == {}
    arrive(daemon, "0201")
    run_everything(daemon, daemon.decide())
    chain = daemon.decide()
    assert sorted(chain) == CHAIN
    run_everything(daemon, chain)
    requested = daemon.decide()
    assert requested == {"final_embeddings": ["march"], "building_embeddings": ["march"]}
    run_everything(daemon, requested)
    assert [daemon.decide() for _ in range(2)] == [{}, {}]


@pytest.mark.parametrize("training", [False, True])
def test_a_drop_is_embedded_with_the_model_there_is(daemon, training: bool) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    if training:
        daemon.start(CHAIN)
    drop(daemon, "march")
    assert daemon.decide() == {"final_embeddings": ["march"], "building_embeddings": ["march"]}


def test_a_replaced_drop_is_embedded_again(daemon) -> None:
    all_made(daemon, "0201")
    drop(daemon, "march", "april")
    for asset in ("final_embeddings", "building_embeddings"):
        daemon.made(asset, "march", "april")
    assert daemon.decide() == {}
    daemon.made("packaged_images", "april")
    assert daemon.decide() == {"final_embeddings": ["april"], "building_embeddings": ["april"]}


def publish(daemon, version: str) -> None:
    daemon.instance.report_runless_asset_event(
        dg.AssetMaterialization("hf_model", tags={"dagster/data_version": version})
    )


def test_a_new_model_embeds_all_drops_again_but_the_same_model_does_not(daemon) -> None:
    all_made(daemon, "0201")
    publish(daemon, "a")
    drop(daemon, "march", "april")
    for asset in ("final_embeddings", "building_embeddings"):
        daemon.made(asset, "march", "april")
    daemon.decide()
    publish(daemon, "a")
    assert daemon.decide() == {}
    publish(daemon, "b")
    both = ["april", "march"]
    assert daemon.decide() == {"final_embeddings": both, "building_embeddings": both}


def test_an_artifact_made_by_hand_carries_on(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    daemon.made("merged_splits")
    assert sorted(daemon.decide()) == ["hf_model", "projector_checkpoint", "retrieval_report"]


def test_a_failed_blocking_check_holds_back_what_follows(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    daemon.made("merged_splits")
    daemon.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey("merged_splits"), check_name="splits_sound", passed=False, blocking=True
        )
    )
    assert daemon.decide() == {}


def test_a_study_is_never_asked_for_and_holds_nothing_up(daemon) -> None:
    arrive(daemon, "0201")
    run_everything(daemon, daemon.decide())
    requested = daemon.decide()
    assert sorted(requested) == CHAIN, "training goes on without a study"
    run_everything(daemon, requested)
    daemon.made("merged_splits")
    run_everything(daemon, daemon.decide())
    assert [daemon.decide() for _ in range(2)] == [{}, {}]


def test_a_new_study_trains_again(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    daemon.made("tuning_study")
    assert sorted(daemon.decide()) == ["hf_model", "projector_checkpoint", "retrieval_report"]


def test_a_study_that_is_under_way_holds_nothing_up_and_is_followed(daemon) -> None:
    all_made(daemon, "0201")
    daemon.made("tuning_study")
    daemon.decide()
    study = daemon.start(["tuning_study"])
    daemon.made("merged_splits")
    requested = daemon.decide()
    assert sorted(requested) == ["hf_model", "projector_checkpoint", "retrieval_report"]
    run_everything(daemon, requested)
    assert daemon.decide() == {}
    daemon.finish(study, {"tuning_study": [""]})
    assert sorted(daemon.decide()) == ["hf_model", "projector_checkpoint", "retrieval_report"]


def test_a_study_that_failed_its_check_is_not_trained_with(daemon) -> None:
    all_made(daemon, "0201")
    daemon.decide()
    daemon.made("tuning_study")
    daemon.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey("tuning_study"), check_name="study_sound", passed=False, blocking=True
        )
    )
    assert daemon.decide() == {}
