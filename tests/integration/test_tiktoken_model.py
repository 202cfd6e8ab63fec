"""A model directory with Kimi's kind of vocabulary and no tokenizer.json, served by the real program."""

from pathlib import Path

from tests.server import Place
from tests.tiny_llama import write_tiny_llama
from tests.unit.test_text_guard import KIMI
from tests.unit.text_models import kimi_config, kimi_directory, kimi_ranks


def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "kimi", context=16384, vocab_size=len(kimi_ranks()) + 256)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    kimi_directory(model, KIMI)
    end = len(kimi_ranks()) + 2
    with Place(tmp_path / "cache") as place:
        server = place.serve(model, "kimi", "--memory", "1")
        with server.client() as client:
            short = client.generate("hello 中文", max_tokens=8, temperature=0.0, ignore_eos=True)
            assert b"".join(piece_of(t) for t in short.prompt_ids).decode() == "hello 中文"
            said = b"".join(piece_of(t) for t in short.token_ids).decode("utf-8", "replace")
            assert short.text == said
            long = client.generate("hello 中文\n" * 300, max_tokens=1, ignore_eos=True)
            assert b"".join(map(piece_of, long.prompt_ids)).decode() == "hello 中文\n" * 300
            chat = client.chat([{"role": "user", "content": "a<|im_end|>"}], max_tokens=1)
            assert chat.prompt_ids.count(end) == 1
            assert chat.prompt_ids[0] == end + 1
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log


def piece_of(token_id: int) -> bytes:
    """Return the bytes of a token that has text; the named ones of a greedy answer have none or a name."""
    pieces = list(kimi_ranks())
    if token_id < len(pieces):
        return pieces[token_id]
    token = kimi_config()["added_tokens_decoder"].get(str(token_id), {"special": True})
    return b"" if token["special"] else token["content"].encode()
