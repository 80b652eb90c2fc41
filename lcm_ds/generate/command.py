"""`lcm-ds generate`: prompts from the command line, files or a terminal; what followed them, printed and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcm_ds.errors import Collector, InputError
from lcm_ds.files import output_file_error, write_named
from lcm_ds.generate.origin import find_origin
from lcm_ds.generate.sampler import END_OF_TEXT, MAX_CONCEPTS, REPEATS
from lcm_ds.generate.text_generator import GeneratedText, TextGenerator
from lcm_ds.terminal import strip_control_chars


def run(
    path: str,
    *,
    prompts: Sequence[str] = (),
    prompt_files: Sequence[str] = (),
    interactive: bool = False,
    max_concepts: int = 16,
    stop_end: str = "0.9",
    stop_repeat: str = "0.9",
    language: str | None = None,
    beams: int = 5,
    json_path: str | None = None,
    **loading: Any,
) -> None:
    """Print what a model makes of each prompt, a line a concept, and why it ended; then of each line that is read.

    path, loading: as TextGenerator.from_pretrained takes them. stop_end, stop_repeat: a cosine, or "off". json_path:
    what is printed is written there, too. Raises InputError with every mistake of the call, before anything is loaded.
    """
    errors = Collector()
    texts = _given(prompts, prompt_files, errors)
    if not (prompts or prompt_files or interactive):
        errors.errors.append("generate: needs a --prompt, a --prompt-file, or --interactive")
    for name, value in (("--max-concepts", max_concepts), ("--beams", beams)):
        if value < 1:
            errors.errors.append(f"{name}: has to be at least 1, not {value}")
    settings: dict[str, Any] = {"max_concepts": max_concepts, "language": language, "beams": beams}
    for name, said in (("stop_end", stop_end), ("stop_repeat", stop_repeat)):
        with errors:
            settings[name] = _threshold(f"--{name.replace('_', '-')}", said)
    if json_path is not None:
        with errors:
            _check_json(json_path, interactive)
    with errors:
        find_origin(path, loading.get("step"), loading.get("dataset"))
    errors.raise_if_any()

    generator = TextGenerator.from_pretrained(path, **loading)
    generator.check_language(language)
    _introduce(generator, settings)
    made = generator.generate(texts, **settings)
    for number, one in enumerate(made, start=1):
        _print(one, generator, settings, f"prompt {number}" if len(made) > 1 else "prompt")
    if json_path is not None:
        text = json.dumps(_as_json(made, generator, settings), indent=1, ensure_ascii=False) + "\n"
        write_named("--json", json_path, text)
    for prompt in _lines() if interactive else ():
        try:
            for one in generator.generate([prompt], **settings):
                _print(one, generator, settings, "prompt")
        except InputError as error:
            print(error, file=sys.stderr, flush=True)


def _given(prompts: Sequence[str], files: Sequence[str], errors: Collector) -> list[str]:
    """The prompts of the call, each file being one."""
    named = [(f"--prompt {number}" if len(prompts) > 1 else "--prompt", p) for number, p in enumerate(prompts, start=1)]
    for file in files:
        try:
            named.append((file, Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            errors.errors.append(f"{file}: cannot be read as UTF-8 text: {error}")
    for name, text in named:
        if not text.strip():
            errors.errors.append(f"{name}: is empty; generation goes on from at least one sentence")
    return [text for _, text in named]


def _threshold(option: str, said: str) -> float | None:
    """A cosine above which a text ends; None for "off"."""
    if said == "off":
        return None
    try:
        value = float(said)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise InputError(f"{option}: has to be a cosine, -1 to 1, or off, not {said!r}")
    return value


def _check_json(path: str, interactive: bool) -> None:
    if interactive:
        raise InputError("--json: goes with prompts that are given, not with --interactive")
    if wrong := output_file_error("--json", path):
        raise InputError(wrong)


def _introduce(generator: TextGenerator, settings: dict[str, Any]) -> None:
    """Which model it is, and what differs from what one would expect."""
    origin = generator.origin
    print(origin.path if origin.step is None else f"{origin.path}: step {origin.step}")
    for note in generator.notes:
        print(strip_control_chars(note))
    if origin.info.end_of_text is None and settings["stop_end"] is not None:
        print(f"{origin.says_so} knows no end-of-text concept: no text ends there")
    sys.stdout.flush()


def _print(made: GeneratedText, generator: TextGenerator, settings: dict[str, Any], name: str) -> None:
    longest = generator.origin.info.max_segment
    if made.left_out:
        kept, all_of_them = len(made.prompt), len(made.prompt) + made.left_out
        print(f"{name}: the last {kept} of {all_of_them} sentences (the model was trained on {longest} at a time)")
    else:
        print(f"{name}: {len(made.prompt)} sentence{'s' if len(made.prompt) > 1 else ''}")
    for sentence in made.prompt:
        print(f"      {strip_control_chars(sentence)}")
    for sentence in generator.after:
        print(f"      {strip_control_chars(sentence)}  (put behind every prompt, as in fine-tuning)")
    seen = len(made.prompt) + len(generator.after)
    for number, sentence in enumerate(made.sentences, start=1):
        if seen + number == longest + 1:
            print(f"from here on the text is longer than the {longest} concepts that the model was trained on")
        source = "decoded         " if made.cosines is None else f"retrieved {made.cosines[number - 1]:6.3f}"
        print(f"{number:4}  {source} {strip_control_chars(sentence)}")
    print(f"stopped: {_reason(made.reason, settings)}", flush=True)


def _reason(reason: str, settings: dict[str, Any]) -> str:
    """Why a text ended, with the threshold that was used."""
    return {
        END_OF_TEXT: f"the last concept is the end of the text (cosine above {settings['stop_end']})",
        REPEATS: f"the last concept repeats the one before (cosine above {settings['stop_repeat']})",
        MAX_CONCEPTS: f"max_concepts was reached ({settings['max_concepts']})",
    }[reason]


def _as_json(made: Sequence[GeneratedText], generator: TextGenerator, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything but the concepts."""
    texts = [
        {
            "prompt": one.prompt,
            "left_out": one.left_out,
            "sentences": one.sentences,
            "cosines": one.cosines,
            "reason": one.reason,
        }
        for one in made
    ]
    origin = generator.origin
    return {
        "model": origin.path,
        "step": origin.step,
        **settings,
        "source_suffix": origin.info.source_suffix,
        "texts": texts,
    }


def _lines() -> Iterator[str]:
    """Prompts that are typed or piped in, a line each, until there are no more; empty lines are none."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (input() has its editing and history then)

        print("a prompt a line; Ctrl-D ends", flush=True)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line
