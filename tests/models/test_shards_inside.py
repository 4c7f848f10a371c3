"""An index of safetensors names files of its own folder; links of the hub's cache are followed."""

import json
import shutil
from pathlib import Path

import pytest

from revprobe import RevprobeError, load_model
from tiny import FIXTURES


@pytest.mark.parametrize("where", ["../other/{}", "{folder}/../other/{}", "sub/../../other/{}"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, where: str) -> None:
    """transformers joins the names to the folder and reads whatever is there: the weights of another model."""
    folder = Path(shutil.copytree(FIXTURES / "llada-tiny-sharded", tmp_path / "model"))
    shutil.copytree(folder, tmp_path / "other")
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = {key: where.format(name, folder=folder) for key, name in told["weight_map"].items()}
    index.write_text(json.dumps(told))
    with pytest.raises(RevprobeError, match=r"index.json names .* which lies outside its folder; put the file"):
        load_model(folder)


def test_links_to_blobs_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate((FIXTURES / "llada-tiny-sharded").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_model(snapshot).mask_token_id is not None
