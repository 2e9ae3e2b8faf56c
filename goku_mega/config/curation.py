"""What curation is given: one section a stage, thresholds apart from the scores that they are held against.

A stage's section decides what its scores are; changing it runs the stage and those after it again. Thresholds decide
what is kept and run nothing. The tables are those of arXiv 2502.04896; docs/curation.md says how each ambiguity of
the paper was settled.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from goku_mega.config.checks import part_of, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class StandardiseConfig:
    """Sources to H.264 (paper 4.2): what is already H.264, upright, of 8 bits and short groups, is taken as it is."""

    gop_frames: int = 48
    """Largest distance of key frames."""
    crf: int = 18
    """x264's quality, lower is better."""
    preset: str = "fast"
    """x264's preset."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "gop_frames", section="standardise.")
        require(0 <= self.crf <= 51, f"standardise.crf is {self.crf}; use 0 to 51")


@dataclass(frozen=True, kw_only=True)
class ShotsConfig:
    """Shot boundaries by PySceneDetect (paper 4.2)."""

    detector: Literal["adaptive", "content"] = "adaptive"
    """adaptive: a change is held against its neighbours, so fast pans are no cuts; content: against a fixed value."""
    threshold: float = 3.0
    """PySceneDetect's threshold of that detector: 3 is its default for adaptive, 27 for content."""
    shortest_frames: int = 12
    """Shots shorter than this are not cut out."""

    def __post_init__(self) -> None:
        require(self.threshold > 0, f"shots.threshold is {self.threshold}; it must be above 0")
        require_at_least(1, self, "shortest_frames", section="shots.")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The finer split where the picture changes without a cut: cosine of neighbouring samples' features (paper 4.2)."""

    embedder: str = "thumbnail"
    """A DINOv2 as a folder or a hub name (`facebook/dinov2-base`), its CLS feature; thumbnail: the frame's
    colours, which need no weights and do not tell scenes of one palette apart."""
    samples_per_second: float = 1.0
    at: Literal["source", "lowest"] = "source"
    """source: split at the `similarity_min` of the highest tier that the source's size reaches; lowest: at the lowest
    tier's, and higher tiers refuse clips whose neighbours are less alike than theirs."""
    device: str = "auto"
    """auto: a GPU where there is one; else a torch device."""

    def __post_init__(self) -> None:
        require(
            self.samples_per_second > 0, f"split.samples_per_second is {self.samples_per_second}; it must be above 0"
        )


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """Clips of at most 10 seconds (paper 4.2): consecutive windows, a short rest is dropped."""

    max_s: float = 10.0
    min_s: float = 2.0

    def __post_init__(self) -> None:
        require(0 <= self.min_s <= self.max_s, f"length.min_s is {self.min_s}; use 0 to length.max_s={self.max_s}")
        require(self.max_s > 0, f"length.max_s is {self.max_s}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class KeyFramesConfig:
    """Key frames that stand for a clip (paper figure 2: one a second)."""

    per_second: float = 1.0

    def __post_init__(self) -> None:
        require(self.per_second > 0, f"key_frames.per_second is {self.per_second}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Alike clips of one source by perceptual hashes of their key frames (paper 4.2)."""

    max_distance: int = 8
    """Bits of 64 in which the hashes of two alike frames may differ."""
    min_share: float = 0.5
    """Share of the shorter clip's key frames that are alike in two alike clips."""

    def __post_init__(self) -> None:
        require(0 <= self.max_distance <= 64, f"dedup.max_distance is {self.max_distance}; use 0 to 64")
        require(0 < self.min_share <= 1, f"dedup.min_share is {self.min_share}; use above 0, to 1")


@dataclass(frozen=True, kw_only=True)
class AestheticConfig:
    """Aesthetic score of key frames, 1 to 10: CLIP's image feature and LAION's head (paper 4.2)."""

    clip: str = ""
    """CLIP as a folder or a hub name (`openai/clip-vit-large-patch14`); empty: not scored."""
    head: str = ""
    """File of the head's weights (`sac+logos+ava1-l14-linearMSE.pth`, or safetensors)."""
    device: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.clip) == bool(self.head), "aesthetic.clip and aesthetic.head need each other; give both")


@dataclass(frozen=True, kw_only=True)
class OcrConfig:
    """Text in the picture: area of the largest box that RapidOCR finds, over the key frame's (paper 4.2)."""

    enabled: bool = True
    min_confidence: float = 0.5
    """Boxes are no text of which the detector is less sure, or of which the letters that are read in them are."""

    def __post_init__(self) -> None:
        require(0 <= self.min_confidence <= 1, f"ocr.min_confidence is {self.min_confidence}; use 0 to 1")


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Motion: mean length of the optical flow, px (paper 4.2)."""

    engine: Literal["dis", "raft"] = "dis"
    """dis: OpenCV's, without weights; raft: RAFT with `weights`."""
    weights: str = ""
    """File of RAFT's weights, in torchvision's names (raft_large or raft_small)."""
    gap_s: float = 0.125
    """Time between the two frames of a pair."""
    short_side_px: int = 480
    """Frames are brought to this height (or width) first, so that px mean the same for every size."""
    pairs_per_second: float = 2.0
    device: str = "auto"

    def __post_init__(self) -> None:
        require(
            (self.engine == "raft") == bool(self.weights),
            f"motion.engine is {self.engine} and motion.weights {self.weights!r}; raft needs weights, dis has none",
        )
        require(self.gap_s > 0, f"motion.gap_s is {self.gap_s}; it must be above 0")
        require(self.pairs_per_second > 0, f"motion.pairs_per_second is {self.pairs_per_second}; it must be above 0")
        require_at_least(16, self, "short_side_px", section="motion.")


@dataclass(frozen=True, kw_only=True)
class HookConfig:
    """A score from 0 to 1 for every key frame by something of your own: NSFW content, watermarks (paper figure 2)."""

    scorer: str = ""
    """`module:function`, called with key frames [frames, height, width, 3] uint8, answers a number a frame; or
    `classifier:FOLDER_OR_HUB_NAME#LABEL`, the probability of a label by an image classifier of transformers; empty:
    not scored."""

    def __post_init__(self) -> None:
        require(
            not self.scorer or re.fullmatch(r"[\w.]+:\w+|classifier:[^#]+#.+", self.scorer) is not None,
            f"scorer is {self.scorer!r}; use module:function or classifier:FOLDER#LABEL",
        )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Captions (paper 4.3): of key frames, of the clip with its camera, both merged; the motion score appended."""

    source: Literal["none", "sidecar", "models"] = "none"
    """sidecar: a .txt beside the source; models: the three below."""
    key_frame_model: str = ""
    """Describes single key frames and images (InternVL2)."""
    clip_model: str = ""
    """Describes the clip and its camera (Tarsier2); empty: key frames alone."""
    merge_model: str = ""
    """Merges the descriptions into one (Qwen2); empty: they are joined as they are."""
    server: str = ""
    """URL of an OpenAI-compatible server (`http://node7:8000/v1`, vLLM) that has the models under these names; empty:
    transformers loads them, as folders or hub names."""
    api_key_file: str = ""
    """File with the server's key; empty: none is sent."""
    clip_frames: int = 8
    """Frames of a clip that the clip's model sees, evenly spread."""
    max_side_px: int = 768
    """Pictures are made smaller than this before they are sent."""
    max_new_tokens: int = 256
    request_timeout_s: float = 120.0
    motion_text: bool = True
    """Append `Motion score: 3.2.`"""
    device: str = "auto"

    def __post_init__(self) -> None:
        require(
            self.source != "models" or bool(self.key_frame_model),
            "caption.source is models; give caption.key_frame_model",
        )
        require_at_least(1, self, "clip_frames", "max_side_px", "max_new_tokens", section="caption.")


@dataclass(frozen=True, kw_only=True)
class TagConfig:
    """One of 86 classes under 9 for every clip, from four key frames (paper 4.4)."""

    model: str = ""
    """A model that sees pictures and answers in text, by its name at `server`, or a folder or hub name; empty: no
    tags."""
    server: str = ""
    """As `caption.server`."""
    api_key_file: str = ""
    classes: str = ""
    """YAML of primary classes and their subclasses; empty: the one that ships, goku_mega/curate/classes.yaml."""
    key_frames: int = 4
    max_side_px: int = 512
    request_timeout_s: float = 120.0
    device: str = "auto"

    def __post_init__(self) -> None:
        require_at_least(1, self, "key_frames", "max_side_px", section="tags.")


@dataclass(frozen=True, kw_only=True)
class RawThresholds:
    """What a source must be before any model looks at it (paper table 3)."""

    duration_min_s: float = 4.0
    short_side_min_px: int = 480
    bitrate_min_bps: int = 500_000
    """Of the video stream, bits a second."""
    frame_rate_min: float = 24000 / 1001
    """Average frames a second; 23.976 passes as 24 does."""
    frame_rate_tolerance: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class TierThresholds:
    """What a clip must be for a tier of resolution (paper table 4); ends are included."""

    short_side_min_px: int
    long_side_min_px: int
    similarity_min: float
    """Cosine of neighbouring samples' features, the lowest in the clip."""
    aesthetic_min: float
    ocr_max: float
    """Largest text box over the frame's area."""
    motion_min_px: float
    motion_max_px: float


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is kept. Nothing here runs a model, and a change of anything but similarity_min runs nothing at all."""

    raw: RawThresholds = field(default_factory=RawThresholds)
    p480: TierThresholds = TierThresholds(
        short_side_min_px=480, long_side_min_px=864, similarity_min=0.85, aesthetic_min=4.3, ocr_max=0.02,
        motion_min_px=0.3, motion_max_px=20.0,
    )  # fmt: skip
    p720: TierThresholds = TierThresholds(
        short_side_min_px=720, long_side_min_px=1280, similarity_min=0.90, aesthetic_min=4.5, ocr_max=0.01,
        motion_min_px=0.5, motion_max_px=15.0,
    )  # fmt: skip
    p1080: TierThresholds = TierThresholds(
        short_side_min_px=1080, long_side_min_px=1920, similarity_min=0.90, aesthetic_min=4.5, ocr_max=0.01,
        motion_min_px=0.5, motion_max_px=8.0,
    )  # fmt: skip
    long_side_tolerance: float = 0.02
    """Share by which a long side may be short: 854x480, the usual 480p, passes for 864x480."""
    nsfw_max: float = 0.5
    watermark_max: float = 0.5

    def __post_init__(self) -> None:
        require(
            0 <= self.long_side_tolerance < 1,
            f"thresholds.long_side_tolerance is {self.long_side_tolerance}; use 0 to 1",
        )

    @property
    def tiers(self) -> dict[str, TierThresholds]:
        """By name, the lowest first."""
        return {"480p": self.p480, "720p": self.p720, "1080p": self.p1080}


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How often each kept clip is in the balanced set (paper 4.4); needs tags."""

    weights: str = "human=1.5"
    """Share of primary classes against the others' 1: `human=1.5,animals=0.5`."""
    max_repeat: int = 4
    """Most times that a clip of a rare subclass is taken."""
    size: int = 0
    """Clips of the balanced set, repeats counted; 0: as many as are kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_repeat", section="balance.")
        require_at_least(0, self, "size", section="balance.")
        require(
            re.fullmatch(r"(\s*[\w -]+=\d+(\.\d+)?\s*(,|$))*", self.weights) is not None,
            f"balance.weights is {self.weights!r}; write class=number, class=number",
        )


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """`goku-mega curate`: raw videos and images to captioned clips that `goku-mega encode` reads."""

    videos: str
    """Folder of sources, searched through, or a text file with a path a line."""
    output: str
    """Scores, verdicts, captions and the report go here; what is found here is not done again."""
    standardise: StandardiseConfig = field(default_factory=StandardiseConfig)
    shots: ShotsConfig = field(default_factory=ShotsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    key_frames: KeyFramesConfig = field(default_factory=KeyFramesConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    ocr: OcrConfig = field(default_factory=OcrConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    nsfw: HookConfig = field(default_factory=HookConfig)
    watermark: HookConfig = field(default_factory=HookConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    tags: TagConfig = field(default_factory=TagConfig)
    thresholds: Thresholds = field(default_factory=Thresholds)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    engine: Literal["local", "ray"] = "local"
    """local: worker processes of this command; ray: Ray Data, on the cluster that RAY_ADDRESS names or on this
    machine (`pip install goku-mega[ray]`)."""
    workers: int = 2
    time_limit_s: float = 900.0
    """A stage that takes longer over one source is ended, and the source set aside."""
    slice: str = "0/1"
    """Part of the sources that this command works on, as `number/parts`, for the tasks of a SLURM array that share
    the output; only `0/1` writes the manifest, and `goku-mega curate filter` does after the others."""
    retry: bool = False
    """Try sources again that were set aside."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "workers")
        require(self.time_limit_s > 0, f"time_limit_s is {self.time_limit_s}; it must be above 0")
        part_of(self.slice)

    @property
    def part(self) -> tuple[int, int]:
        """(number, parts) of `slice`."""
        return part_of(self.slice)
