"""An ensemble of small MLPs over mixtures (paper, section 4: "a lightweight neural regressor").

Every member has a linear path from features to targets beside two hidden layers, all targets share the layers, and all
members train at once as one batch of matrix products: AdamW with strong weight decay, a cosine to zero, a fixed number
of steps whatever the number of runs. Members differ in initial weights and in the order of the runs. Their mean is the
prediction and their spread its doubt.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from mobilellm_pro.data_mix.regressor import (
    NOT_FITTED,
    Prediction,
    Scale,
    checked_features,
    checked_tables,
    single_threaded,
)


@dataclass
class NeuralEnsemble:
    """`Regressor`: mean and standard deviation over the members.

    Attributes:
        seed: of initial weights and order.
        members, width: of the ensemble, and of the two hidden layers.
        steps, batch_runs: updates, and calibration runs in each (all of them when there are fewer).
        learning_rate, weight_decay: of AdamW, at the begin.
    """

    seed: int = 0
    members: int = 8
    width: int = 32
    steps: int = 2400
    batch_runs: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.6
    _scales: tuple[Scale, Scale] | None = field(default=None, repr=False)
    _parameters: list[torch.Tensor] = field(default_factory=list, repr=False)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> "NeuralEnsemble":
        """See `Regressor.fit`; seconds hardly depend on N."""
        features, targets = checked_tables(features, targets)
        self._scales = Scale.of(features), Scale.of(targets)
        inputs = torch.from_numpy(self._scales[0].apply(features)).float()
        wanted = torch.from_numpy(self._scales[1].apply(targets)).float()
        with single_threaded(), torch.enable_grad():
            self._parameters = self._train(inputs, wanted)
        return self

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Regressor.predict`."""
        outputs = self.predict_members(features)
        return outputs.mean(0), outputs.std(0)

    def predict_members(self, features: np.ndarray) -> np.ndarray:
        """Of each member: [members, M, T]."""
        return self._predict(self._parameters, features)

    def draw(self, seed: int) -> Prediction:
        """See `Regressor.draw`: a member."""
        if self._scales is None:
            raise ValueError(NOT_FITTED)
        chosen = int(np.random.default_rng(seed).integers(self.members))
        parameters = [tensor[chosen : chosen + 1] for tensor in self._parameters]
        return lambda features: self._predict(parameters, features)[0]

    def _predict(self, parameters: list[torch.Tensor], features: np.ndarray) -> np.ndarray:
        features = checked_features(features, self._parameters[0].shape[1] if self._scales else None)
        assert self._scales is not None
        inputs = torch.from_numpy(self._scales[0].apply(features)).float()
        with single_threaded(), torch.no_grad():
            outputs = _forward(parameters, inputs.expand(len(parameters[0]), -1, -1))
        return self._scales[1].undo(outputs.double().numpy())

    def _train(self, inputs: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        matrices, biases = self._initial(inputs.shape[1], wanted.shape[1], generator)
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = torch.empty(self.members, 0, dtype=torch.long)
        count = min(self.batch_runs, len(inputs))
        seen, known = inputs.expand(self.members, -1, -1), wanted  # all runs, where one step takes all
        for _ in range(self.steps):
            if count < len(inputs):
                if order.shape[1] < count:
                    order = torch.stack([torch.randperm(len(inputs), generator=generator) for _ in range(self.members)])
                runs, order = order[:, :count], order[:, count:]
                seen, known = inputs[runs], wanted[runs]
            optimizer.zero_grad()
            error = _forward([*matrices, *biases], seen) - known
            (error.square().mean() * self.members).backward()  # a member's step does not depend on their number
            optimizer.step()
            schedule.step()
        return [tensor.detach() for tensor in (*matrices, *biases)]

    def _initial(
        self, num_features: int, num_targets: int, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Matrices of the three layers and of the linear path (which starts at zero), and biases of the layers."""
        sizes = [num_features, self.width, self.width, num_targets]
        matrices = [torch.randn(self.members, a, b, generator=generator) / a**0.5 for a, b in zip(sizes, sizes[1:])] + [
            torch.zeros(self.members, num_features, num_targets)
        ]
        biases = [torch.zeros(self.members, 1, b) for b in sizes[1:]]
        return [x.requires_grad_() for x in matrices], [x.requires_grad_() for x in biases]


def _forward(parameters: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """[members, B, T] of inputs [members, B, F]; parameters as `_initial` gives them, matrices first."""
    first, second, last, linear, *biases = parameters
    hidden = torch.nn.functional.silu(torch.baddbmm(biases[0], inputs, first))
    hidden = torch.nn.functional.silu(torch.baddbmm(biases[1], hidden, second))
    return torch.baddbmm(biases[2], hidden, last) + inputs @ linear
