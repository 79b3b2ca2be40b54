import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, and a CPU that trains in bf16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # Scripts and configurations train in bf16, TRL's default, which Trainer grants a GPU alone; PyTorch's CPU kernels have it.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
