"""Sample counts of the public data, from papers and their authors' files: literature values, not measured here."""

from __future__ import annotations

# VQA: Karpathy's images; the three splits add up to the 443,757 + 214,354 questions of VQA v2's train and val (Goyal
#   et al., 2017); the 26,280 are the 24,722 in-domain and 1,558 out-of-domain questions of VL-T5 (Cho et al., 2021)
# GQA: balanced train 943,000 + valid 132,062; testdev (Hudson and Manning, 2019)
# NLVR2: train, development and test-P (Suhr et al., 2019)
# COCO: captions of Karpathy's train and restval, images of his val and test (Karpathy and Fei-Fei, 2015)
# TVQA: Lei et al., 2018. How2QA and YC2C val: VALUE's released files; YC2C train: Zhou et al., 2018
SAMPLES: dict[tuple[str, str], int] = {
    ("vqa", "train"): 605_102,
    ("vqa", "val"): 26_729,
    ("vqa", "test"): 26_280,
    ("gqa", "train"): 1_075_062,
    ("gqa", "val"): 12_578,
    ("gqa", "test"): 12_578,
    ("nlvr2", "train"): 86_373,
    ("nlvr2", "val"): 6_982,
    ("nlvr2", "test"): 6_967,
    ("caption", "train"): 566_747,
    ("caption", "val"): 5_000,
    ("caption", "test"): 5_000,
    ("tvqa", "train"): 122_039,
    ("tvqa", "val"): 15_253,
    ("how2qa", "val"): 3_115,
    ("yc2c", "train"): 10_337,
    ("yc2c", "val"): 3_492,
}
