import pytest

from growfx.reporting.run import layer_rows, percent, result_rows, summary, table

RESULT = {
    "method": "pwmpr",
    "model": "resnet18",
    "density": 0.123,
    "nnz": 1230,
    "numel": 10000,
    "mask_digest": "ab" * 32,
    "val_accuracy": 0.9,
    "test_accuracy": None,
    "dense_equivalent_epochs": 12.345,
    "epochs": 40,
    "steps": 4000,
    "stop_reason": "plateau",
    "trace": [],
}


@pytest.mark.parametrize(("value", "text"), [(0.12345, "12.35 %"), (1, "100.00 %"), (None, "-")])
def test_a_fraction_is_shown_in_percent(value, text):
    assert percent(value) == text


def test_a_result_is_shown_with_units_and_its_artifacts_size():
    text = table(result_rows(RESULT, 1234567))
    assert "12.30 % (1,230 of 10,000 weights)" in text
    assert "12.35 dense-equivalent epochs" in text
    assert "1,234,567 bytes" in text


def test_a_summary_lists_the_rounds_with_their_predicted_gain():
    fit = {"gain": 0.004, "gain_error": 0.001}
    rounds = [
        {"round": 0, "density": 0.05, "val_accuracy": 0.8, "noise": 0.002, "fit": None},
        {"round": 1, "density": 0.07, "val_accuracy": 0.85, "noise": 0.002, "fit": fit},
    ]
    text = summary(RESULT, rounds, 10)
    assert "0.40 +- 0.10" in text
    assert "growth stopped: plateau" in text
    assert "growth stopped" not in summary(RESULT, [], 10)


def test_a_summary_says_how_newborn_edges_fare_beside_older_ones_and_what_rounds_cost():
    def cohort(born, edges, survival, magnitude, share):
        facts = {"born": born, "age": 1 - born, "edges": edges, "survival": survival}
        return {**facts, "magnitude": magnitude, "gradient_share": share}

    first = [cohort(0, 100, 1.0, 0.2, 1.0)]
    second = [cohort(0, 100, 1.0, 0.2, 0.8), cohort(1, 50, 0.5, 0.05, 0.2)]
    shared = {"val_accuracy": 0.8, "noise": 0.002, "fit": {"gain": 0.1, "gain_error": 0.1, "curve": "power law"}}
    rounds = [
        {"round": 0, "density": 0.05, "cost": 0.0321, "cohorts": first, **shared},
        {"round": 1, "density": 0.07, "cost": 0.0432, "cohorts": second, **shared},
    ]
    text = summary(RESULT, rounds, 10)
    assert "3.21 %" in text
    assert "power law" in text
    # 0.2 of the gradient on 50 edges beside 0.8 on 100; 0.05 beside 0.2
    assert "0.50 x" in text
    assert "0.25 x" in text
    assert "50.00 %" in text


def test_layers_show_bytes_and_alive_units_where_they_are_known():
    layers = [
        {"name": "a", "shape": [4, 3], "nnz": 6, "numel": 12, "bytes": 100, "alive_in": [2, 3], "alive_out": [4, 4]},
        {"name": "b", "shape": [2, 4], "nnz": 8, "numel": 8, "bytes": 50},
    ]
    rows = layer_rows(layers)
    assert rows[0]["alive in"] == "2/3"
    assert rows[1]["alive in"] == "-"
    assert rows[0]["density"] == "50.00 %"
    assert rows[0]["bytes"] == "100"
    assert "bytes" not in layer_rows([{k: v for k, v in layers[1].items() if k != "bytes"}])[0]
    assert "4x3" in table(rows)
