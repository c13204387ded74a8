import math

import numpy as np
import pytest
import torch
from torch import nn

from growfx.errors import ConfigError, DataError
from growfx.training.evaluation import Score, evaluate, logits_of, paired_noise


class Fixed(nn.Module):
    """Answers with the images themselves as class scores; notes the mode it was called in."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen_training = self.training
        return images


def batches(scores: torch.Tensor, targets: torch.Tensor, size: int):
    return list(zip(scores.split(size), targets.split(size), strict=True))


def test_accuracy_is_that_of_the_largest_score_over_all_batches():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    targets = torch.tensor([0, 2, 1, 1])
    score = evaluate(Fixed(), batches(scores, targets, 3), "cpu")
    assert score.correct.tolist() == [True, True, True, False]
    assert score.accuracy == 0.75


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_scored_in_eval_mode_and_left_in_its_own(training):
    net = Fixed().train(training)
    evaluate(net, [(torch.eye(2), torch.tensor([0, 1]))], "cpu")
    assert net.training == training
    assert net.seen_training is False


def test_an_empty_loader_is_refused():
    with pytest.raises(DataError, match="gives no images"):
        evaluate(Fixed(), [], "cpu")


def test_a_class_without_an_output_is_refused():
    with pytest.raises(DataError, match="class number 2, but the network has 2 outputs"):
        evaluate(Fixed(), [(torch.eye(2), torch.tensor([0, 2]))], "cpu")


def test_class_scores_are_the_first_part_of_a_tuple():
    scores = torch.zeros(2, 3)
    assert logits_of(scores) is scores
    assert logits_of((scores, torch.ones(2, 3))) is scores
    with pytest.raises(ConfigError, match=r"output is a tensor of shape \(2, 3, 4\)"):
        logits_of(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="output is dict"):
        logits_of({"out": scores})


def test_the_standard_error_is_binomial_and_never_zero():
    half = Score(torch.arange(10000) % 2 == 0)
    assert half.standard_error == pytest.approx(0.005, rel=1e-3)
    assert Score(torch.ones(100, dtype=torch.bool)).standard_error > 0


def test_paired_noise_is_the_spread_of_networks_that_are_wrong_on_different_images():
    # Two networks share 80 % of the images; on the rest each is right with probability one half.
    generator = np.random.default_rng(0)
    n, differences, noises = 2000, [], []
    shared = np.arange(n) < 0.8 * n
    for _ in range(400):
        first, second = (Score(torch.from_numpy(shared | (generator.random(n) < 0.5))) for _ in range(2))
        differences.append(first.accuracy - second.accuracy)
        noises.append(paired_noise(first, second))
    assert np.mean(noises) == pytest.approx(np.std(differences) / math.sqrt(2), rel=0.1)


def test_paired_noise_of_equal_networks_is_small_but_not_zero():
    score = Score(torch.arange(1000) % 4 > 0)
    assert 0 < paired_noise(score, score) < 0.1 * score.standard_error


def test_scores_of_different_images_are_not_paired():
    with pytest.raises(ValueError, match="different images"):
        paired_noise(Score(torch.ones(3, dtype=torch.bool)), Score(torch.ones(4, dtype=torch.bool)))
