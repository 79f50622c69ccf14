"""Several runs in one table and one figure."""

import pandas as pd
from PIL import Image

from demo2eval.evaluation.success_curves import make_success_curves

ROW = {"step": 0, "episodes": 10, "success_once": 0.3, "ci_low": 0.1, "ci_high": 0.6}


def test_runs_of_a_task_share_a_panel(tmp_path):
    tasks = {"first": "PushCube-v1", "second": "PushCube-v1", "third": "StackCube-v1"}
    sizes = []
    for names in (["first", "second"], ["first", "second", "third"]):
        tables = []
        for name in names:
            tables.append(tmp_path / f"{name}.csv")
            rows = [{"run": name} | ROW | {"step": step} for step in (0, 100)]
            pd.DataFrame(rows).to_csv(tables[-1], index=False)
        table, curves = tmp_path / "success_curves.csv", tmp_path / "success_curves.png"
        published = {"PushCube-v1": {"others": 92.0}}
        make_success_curves(tables, tasks=tasks, published=published, table=table, curves=curves)
        joined = pd.read_csv(table)
        assert joined.run.unique().tolist() == names
        assert joined.task.tolist() == joined.run.map(tasks).tolist()
        with Image.open(curves) as image:
            sizes.append(image.height)
    assert sizes[1] > 1.5 * sizes[0]
