"""Captions (paper 4.3): key frames and the clip are described apart, and the descriptions merged into one.

Images have a key frame's description alone. The motion score is not in here: it is a clip's, and
`curate.motion_text` puts it behind the caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goku_mega.config.curation import CaptionConfig
from goku_mega.curate.answers import tidy
from goku_mega.curate.chat import Chat, ChatSettings, Picture, ask_all, open_chat, shrink
from goku_mega.curate.clip import Clip
from goku_mega.errors import DataError, MediaError

IMAGE_PROMPT = (
    "Describe this picture in one dense paragraph of 60 to 120 words. Name the main subjects with their number, "
    "looks, clothing, pose, expression and what they do; then where they are to each other, the background, the "
    "light, the colours, the style (photograph, film, animation, drawing, rendering) and the camera's angle and "
    "distance. Copy text that can be read in the picture in quotation marks. Say only what can be seen: no guesses "
    "about names, moods or stories, and no remarks about the picture's quality. Begin with the main subject, not with "
    "words like 'The image shows'. Answer with the paragraph alone."
)
KEY_FRAME_PROMPT = (
    "This is one frame of a video. Describe it in one dense paragraph of 40 to 80 words. Name the main subjects with "
    "their number, looks, clothing, pose and what they do; then where they are to each other, the background, the "
    "light, the colours and the style (film, animation, rendering). Say only what can be seen in this frame: no "
    "guesses about what comes before or after, about names or moods. Begin with the main subject, not with words like "
    "'The frame shows'. Answer with the paragraph alone."
)
CLIP_PROMPT = (
    "These {frames} pictures are frames of one video of {duration_s:.1f} seconds, evenly spread over it and in their "
    "order. Describe the video in one paragraph of 60 to 120 words. Say what the main subjects look like, and what "
    "happens to them in its order: each action with its direction and pace, and what changes in the scene. Then say "
    "how the camera moves, by comparing the frames: it stands still, pans left or right, tilts up or down, zooms in or "
    "out, moves forwards or backwards, follows a subject, circles it, or shakes in a hand. Say only what can be seen; "
    "do not speak of frames or pictures. Answer with the paragraph alone."
)
MERGE_PROMPT = (
    "Below are descriptions of one video of {duration_s:.1f} seconds, by several observers. Merge them into a single "
    "description of the video: one flowing paragraph of 80 to 160 words in the present tense.\n"
    "Rules:\n"
    "- What happens, its order and the camera's movement come from the description of the whole video, where there is "
    "one; keep every movement of the camera that it names.\n"
    "- Looks, clothing, places, light, colours and style come from the descriptions of single moments.\n"
    "- Where descriptions contradict each other, keep what most of them say, and leave out what remains unclear.\n"
    "- Tell each thing once, and add nothing that no description says.\n"
    "- Do not mention descriptions, observers, frames, moments or times.\n"
    "Answer with the paragraph alone.\n\n"
    "{descriptions}"
)
WHOLE_VIDEO = "The whole video:"
MOMENT = "After {second:.1f} seconds:"


@dataclass(frozen=True)
class CaptionScore:
    """A clip's caption, without its motion score, and what it was made of."""

    caption: str
    key_frame_captions: tuple[str, ...]
    """One a key frame, in their order; empty for captions that come with the source."""
    clip_caption: str
    """Empty for images and without a model for clips."""


class Caption:
    """Models or files that captions come from, as the config names them."""

    def __init__(self, config: CaptionConfig) -> None:
        """
        Raises:
            ConfigError: a model cannot be loaded, or the server's address or key is none.
        """
        self.config = config
        settings = ChatSettings(
            server=config.server, api_key_file=config.api_key_file, max_new_tokens=config.max_new_tokens,
            request_timeout_s=config.request_timeout_s, device=config.device,
        )  # fmt: skip
        names = (config.key_frame_model, config.clip_model) if config.source == "models" else ("", "")
        # One model that does both is loaded once.
        seeing = {name: open_chat(name, settings, sees=True) for name in dict.fromkeys(names) if name}
        self._key_frames, self._clip = (seeing.get(name) for name in names)
        merge_model = config.merge_model if config.source == "models" else ""
        self._merge = open_chat(merge_model, settings, sees=False) if merge_model else None

    def score(self, clip: Clip, source: Path) -> CaptionScore:
        """
        Args:
            source: the file that the clip is from, as it was given.

        Raises:
            MediaError: the caption beside the source cannot be read.
            DataError: a model has no answer for this clip.
            ConfigError: the server is gone, or has no such model.
        """
        if self._key_frames is None:
            caption = sidecar_caption(source) if self.config.source == "sidecar" else ""
            return CaptionScore(caption, (), "")
        if clip.is_image:
            image = shrink(clip.footage.read([0])[0], self.config.max_side_px)
            (caption,) = self._describe(self._key_frames, [(IMAGE_PROMPT, [image])])
            return CaptionScore(caption, (caption,), "")
        pictures = [shrink(frame, self.config.max_side_px) for frame in clip.key_frames]
        key_frame_captions = self._describe(self._key_frames, [(KEY_FRAME_PROMPT, [picture]) for picture in pictures])
        clip_caption = self._describe_clip(clip)
        seconds = [(number - clip.first) / clip.frame_rate for number in clip.key_frame_numbers]
        merged = self._merged(key_frame_captions, seconds, clip_caption, clip.duration_s)
        return CaptionScore(merged, tuple(key_frame_captions), clip_caption)

    def _describe_clip(self, clip: Clip) -> str:
        if self._clip is None:
            return ""
        frames = [shrink(frame, self.config.max_side_px) for frame in clip.spread(self.config.clip_frames)]
        prompt = CLIP_PROMPT.format(frames=len(frames), duration_s=clip.duration_s)
        return self._describe(self._clip, [(prompt, frames)])[0]

    def _merged(
        self, key_frame_captions: Sequence[str], seconds: Sequence[float], clip_caption: str, duration_s: float
    ) -> str:
        joined = join_captions(key_frame_captions, clip_caption)
        if self._merge is None or joined in (clip_caption, *key_frame_captions):  # there is nothing to merge
            return joined
        prompt = merge_prompt(key_frame_captions, seconds, clip_caption, duration_s)
        return self._describe(self._merge, [(prompt, [])])[0]

    def _describe(self, chat: Chat, questions: Sequence[tuple[str, Sequence[Picture]]]) -> list[str]:
        captions = [tidy(answer) for answer in ask_all(chat, questions)]
        if not all(captions):
            raise DataError("a caption's model has answered with no words; look at what it answers, or take another")
        return captions


def merge_prompt(
    key_frame_captions: Sequence[str], seconds: Sequence[float], clip_caption: str, duration_s: float
) -> str:
    """What the merging model is asked.

    Args:
        seconds: when each key frame is shown, from the clip's start.
    """
    descriptions = [f"{WHOLE_VIDEO}\n{clip_caption}"] if clip_caption else []
    descriptions += [
        f"{MOMENT.format(second=second)}\n{caption}"
        for second, caption in zip(seconds, key_frame_captions, strict=True)
    ]
    return MERGE_PROMPT.format(duration_s=duration_s, descriptions="\n\n".join(descriptions))


def join_captions(key_frame_captions: Sequence[str], clip_caption: str) -> str:
    """The descriptions one behind the other, the clip's first, each once."""
    return " ".join(caption for caption in dict.fromkeys((clip_caption, *key_frame_captions)) if caption)


def sidecar_caption(source: Path) -> str:
    """The text beside a source, of `clip.mp4` in `clip.mp4.txt`, else in `clip.txt`, in one line.

    Raises:
        MediaError: there is no such file, or no text in it.
    """
    files = (source.with_name(f"{source.name}.txt"), source.with_suffix(".txt"))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MediaError(f"{source}: has no caption beside it; write {files[1].name} or {files[0].name}")
    try:
        caption = " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{file}: cannot be read as a caption ({error}); write it in UTF-8") from None
    if not caption:
        raise MediaError(f"{file}: is empty; write the caption of {source.name} into it")
    return caption
