"""A first walk through the whole house."""


def test_train_merge_and_count_agree(recipe, lora, tmp_path):
    trained = lora("train", recipe(**{"dataset.eval_size": 4}), "--json")
    assert trained.code == 0, trained.err
    merged = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["within_limit"] is True
    counted = lora("count-params", tmp_path / "run" / "adapter", "--json")
    assert counted.json["learnable"] == trained.json["parameters"]["trainable"]
