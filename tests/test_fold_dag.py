"""Many jobs of a rule are one box; finished ones are told from those to do."""

from demo2eval.fold_dag import fold

GRAPH = """\
---
title: DAG
---
flowchart TB
\tid0[success_table]
\tid1[train - step: 20]
\tid2[train - step: 10]
\tid3[init_checkpoint - run: mine]
\tid4[replay - replay: task-replayed-1]
\tid5[plan - demos: task-planned-1 - shard: 000]
\tid6[replay - replay: task-replayed-1]
\tid7[plan - demos: task-planned-1 - shard: 001]
\tid8[rollout]
\tid9[rollout]
\tstyle id0 fill:#57D989,stroke-width:2px,color:#333333
\tstyle id1 fill:#57D989,stroke-width:2px,color:#333333
\tstyle id2 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id3 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id4 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id5 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id6 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id7 fill:#57D989,stroke-width:2px,color:#333333,stroke-dasharray: 5 5
\tstyle id8 fill:#57D989,stroke-width:2px,color:#333333
\tstyle id9 fill:#57D989,stroke-width:2px,color:#333333
\tid8 --> id0
\tid9 --> id0
\tid1 --> id8
\tid2 --> id9
\tid2 --> id1
\tid3 --> id2
\tid5 --> id4
\tid7 --> id6
\tid4 --> id3
\tid6 --> id3
"""


def test_jobs_become_boxes():
    lines = fold(GRAPH).splitlines()
    boxes = dict(line.strip().removesuffix('"]').split('["') for line in lines if '["' in line)
    assert sorted(boxes.values()) == [
        "init_checkpoint<br/>mine<br/>done",
        "plan<br/>task-planned-1<br/>2 shards: 000 to 001<br/>done",
        "replay<br/>task-replayed-1<br/>2 shards: 000 to 001<br/>done",
        "rollout<br/>mine<br/>2 steps: 10 to 20<br/>to do",
        "success_table<br/>mine<br/>to do",
        "train<br/>mine<br/>step 10<br/>done",
        "train<br/>mine<br/>step 20<br/>to do",
    ]
    (done,) = (line.split()[1].split(",") for line in lines if line.strip().startswith("class "))
    assert {boxes[name] for name in done} == {text for text in boxes.values() if "done" in text}
    edges = [
        tuple(boxes[name.strip()] for name in line.split("-->")) for line in lines if "-->" in line
    ]
    assert ("train<br/>mine<br/>step 10<br/>done", "train<br/>mine<br/>step 20<br/>to do") in edges
    assert len(edges) == len(set(edges)) == 7
