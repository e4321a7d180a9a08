"""The accuracy example reads real data as the models it names take them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from frontend_tools import data_folder

from pocktvm.autodiff.losses import parse_loss
from pocktvm.data import check_data
from pocktvm.frontend.resolve import resolve_model
from pocktvm.frontend.source import import_model
from pocktvm.identity import label_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "accuracy"))

from tasks import TASKS

pytestmark = pytest.mark.data


@pytest.mark.parametrize("name", TASKS)
def test_samples_fit_the_model(name):
    folder, task = data_folder(), TASKS[name]
    train, test = task.load(folder, 64)
    source = resolve_model(task.model, batch=task.batch, weights=folder / task.weights)
    model = import_model(
        source.module, source.example_inputs, mean=source.mean, scale=source.scale
    )
    specs = label_inputs(model, parse_loss(source.loss))
    for samples in (train, test):
        arrays = check_data(samples, specs, whole_batch=False)
        assert len(np.unique(arrays["y"])) > 1
    assert len(next(iter(train.values()))) == 64
    assert len(next(iter(test.values()))) >= 1000 or name == "stories"
