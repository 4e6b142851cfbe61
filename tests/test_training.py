"""Training with pruned prompts: gradients, checkpointing, LoRA, Trainer."""

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import tiny_checkpoint
from conftest import TEXTS
from transformers_rbl import scatter_to_prompt


@pytest.fixture
def labelled(family):
    inputs = family.inputs(TEXTS, family.images(4), side="right")
    ignored = (inputs.attention_mask == 0) | (inputs.input_ids == tiny_checkpoint.IMAGE)
    return {**inputs, "labels": inputs.input_ids.masked_fill(ignored, -100)}


def test_gradients_reach_projector_and_language_model_and_stop_at_the_codebook(family, labelled):
    model = family.pruned()
    model(**labelled).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert "model.codebook.prototypes" not in dict(model.named_parameters())


def test_gradient_checkpointing_changes_nothing(family, labelled):
    plain, checkpointed = family.pruned().train(), family.pruned().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(**labelled).loss for model in (plain, checkpointed)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(plain.lm_head.weight.grad, checkpointed.lm_head.weight.grad)
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(plain.get_parameter(weight).grad, checkpointed.get_parameter(weight).grad)


def test_lora(family, labelled, one, tmp_path):
    model = get_peft_model(family.pruned(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model(**labelled).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n and "language_model" in n)
    kwargs = {"do_sample": False, "max_new_tokens": 5}
    answer = model.generate(**one, **kwargs)
    assert torch.equal(answer[:, : one.input_ids.shape[1]], one.input_ids)
    merged = model.merge_and_unload()
    assert type(merged) is family.rbl_class
    assert torch.equal(merged.generate(**one, **kwargs), answer)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch, count=8):
        self.batch, self.count = batch, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index % len(TEXTS)


def trainer(model, labelled, folder, **kwargs):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **kwargs.pop("arguments", {}),
    )
    data = Rows(labelled)
    return Trainer(model, arguments, lambda rows: dict(labelled), train_dataset=data, eval_dataset=data, **kwargs)


def test_trainer_with_evaluation_and_metrics(family, labelled, tmp_path):
    """By default predictions are compact, with the labels that belong to them beside."""
    seen = {}

    def metrics(prediction):
        logits, labels = prediction.predictions
        seen["accuracy"] = float((logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].mean())
        assert logits.shape[:2] == labels.shape and labels.shape[1] < prediction.label_ids.shape[1]
        return seen

    train = trainer(family.pruned(), labelled, tmp_path, compute_metrics=metrics)
    train.train()
    result = train.evaluate()
    assert np.isfinite(result["eval_loss"]) and result["eval_accuracy"] == seen["accuracy"]


def test_trainer_with_full_length_logits_and_label_smoothing(family, labelled, tmp_path):
    """`full_length_logits` lets code that pairs logits with its own labels run as it is."""
    model, plain = family.pruned(), family.pruned()
    model.config.full_length_logits = True
    full, compact = model(**labelled), plain(**labelled)
    assert full.logits.shape[:2] == labelled["labels"].shape and torch.equal(full.loss, compact.loss)
    shifted = torch.nn.functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), labelled["labels"][:, 1:].flatten())
    torch.testing.assert_close(shifted, compact.loss)
    expected = scatter_to_prompt(compact.logits, compact.prompt_mask, "right", fill="previous")
    assert torch.equal(full.logits, expected) and full.prompt_mask.all()

    def metrics(prediction):
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape
        return {}

    arguments = {"label_smoothing_factor": 0.1}
    train = trainer(model, labelled, tmp_path, compute_metrics=metrics, arguments=arguments)
    assert np.isfinite(train.train().training_loss)
    assert np.isfinite(train.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**{**labelled, "labels": None}, logits_to_keep=1)


def test_a_step_of_training_lowers_the_loss(family, labelled):
    model = family.pruned().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(**labelled).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_evaluation_of_batches_with_and_without_images(family, labelled, tmp_path):
    """Outputs of every batch carry the same entries, or Trainer cannot gather them."""
    texts = {k: labelled[k][-1:, : int(labelled["attention_mask"][-1].sum())] for k in ("input_ids", "attention_mask")}
    texts["labels"] = texts["input_ids"]
    batches = {0: labelled, 1: texts}

    class Two(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return index

    for full_length in (False, True):
        model = family.pruned()
        model.config.full_length_logits = full_length
        arguments = TrainingArguments(
            tmp_path,
            per_device_eval_batch_size=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        seen = {}

        def metrics(prediction, seen=seen):
            seen["tuple"] = isinstance(prediction.predictions, tuple)
            return {}

        train = Trainer(model, arguments, lambda rows: dict(batches[rows[0]]), compute_metrics=metrics)
        assert np.isfinite(train.evaluate(Two())["eval_loss"])
        assert seen["tuple"] != full_length


QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
LONG, SHORT = ([{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("How many", "see"))


def trl_trainer(kind, family, tmp_path, model, **kwargs):
    """TRL's trainer of one kind, on four images, two steps."""
    names = {"SFT": {"completion": LONG}, "DPO": {"chosen": LONG, "rejected": SHORT}}[kind]
    texts = {name: [text] * 4 for name, text in {"prompt": QUESTION, **names}.items()}
    rows = Dataset.from_dict({"images": [[image] for image in family.images(4)], **texts})
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        per_device_train_batch_size=4,  # all rows, so that means over a batch are of any order
        max_steps=2,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = getattr(trl, f"{kind}Trainer")
    return trainer(model, args=arguments, train_dataset=rows, processing_class=family.processor, **kwargs)


def full_length(family):
    model = family.pruned()
    model.config.full_length_logits = True
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_sft_of_trl_trains_with_the_loss_of_compact_prompts(family, tmp_path, lora):
    """TRL runs the headless model, and pairs what it returns with full-length labels."""
    config = LoraConfig(target_modules=["q_proj"], r=2) if lora else None
    train = trl_trainer("SFT", family, tmp_path, full_length(family), peft_config=config)
    batch = next(iter(train.get_train_dataloader()))
    expected = family.pruned()(**{name: value for name, value in batch.items() if name != "use_cache"})
    train.model.eval()
    assert expected.logits.shape[1] < batch["input_ids"].shape[1]  # the language model sees fewer tokens
    torch.testing.assert_close(train.compute_loss(train.model, dict(batch)), expected.loss, atol=1e-5, rtol=1e-5)
    before = {name: value.clone() for name, value in train.model.named_parameters() if value.requires_grad}
    assert np.isfinite(train.train().training_loss)
    assert any((value != before[name]).any() for name, value in train.model.named_parameters() if name in before)


def test_without_full_length_logits_trl_stops(family, tmp_path):
    """As the guide says: it isn't trained on labels beside their place."""
    train = trl_trainer("SFT", family, tmp_path, family.pruned())
    with pytest.raises((RuntimeError, IndexError), match="shape"):
        train.train()


def test_dpo_of_trl_trains(family, tmp_path):
    train = trl_trainer("DPO", family, tmp_path, full_length(family), ref_model=full_length(family))
    train.args.logging_steps = 1
    train.train()
    first = train.state.log_history[0]
    batch = next(iter(train.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with torch.no_grad():
        compact = family.pruned()(**batch, labels=labels)
    targets, said = compact.labels[:, 1:], compact.logits[:, :-1].log_softmax(-1)
    each = said.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0).sum(1)
    assert first["loss"] == pytest.approx(
        np.log(2), abs=1e-4
    )  # the reference is the model itself, before its first step
    assert first["logps/chosen"] == pytest.approx(float(each[:4].mean()), rel=1e-4)
    assert train.state.log_history[1]["rewards/margins"] != 0
