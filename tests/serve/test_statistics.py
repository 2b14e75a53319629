"""Counts of inference where requests are joined: Triton's document and Prometheus' text."""

from __future__ import annotations

from agent.serve.statistics import Statistics


def test_a_run_of_several_requests_counts_once_among_its_size():
    statistics = Statistics(lambda: 5.0)
    for rows, requests in ((6, 3), (6, 3), (6, 3), (1, 1), (6, 2), (6, 2)):
        statistics.succeeded("m", "1", 9000, 1000, 6000, batch=(rows, requests))
    statistics.succeeded("m", "1", 9000, 0, 0, cached=True, batch=(6, 3))
    statistics.succeeded("m", "1", 9000, 1000, 6000)  # on the loop, at once
    [document] = statistics.document([("m", "1")])["model_stats"]
    assert document["inference_count"] == 8
    assert document["execution_count"] == 4
    assert document["inference_stats"]["cache_hit"]["count"] == 1
    assert document["batch_stats"] == [
        {"batch_size": 1, "compute_infer": {"count": 1, "ns": 6000}},
        {"batch_size": 6, "compute_infer": {"count": 2, "ns": 12000}},
    ]
    lines = statistics.prometheus(lambda model: True)
    assert 'edge_agent_infer_joined_runs_total{model="m",version="1"} 3' in lines
    assert 'edge_agent_infer_joined_requests_total{model="m",version="1"} 6' in lines


def test_without_joining_nothing_is_said_of_it():
    statistics = Statistics()
    statistics.succeeded("m", "1", 9000, 1000, 6000)
    assert statistics.document([("m", "1")])["model_stats"][0]["batch_stats"] == []
    assert not any("joined" in line for line in statistics.prometheus(lambda model: True))
