"""Procedural torso CTs: an atlas of simple solids, warped smoothly into any number of subjects."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Int16

from medssl.data.volume import Volume
from medssl.phantoms.canvas import (
    FAT_HU,
    GAS_HU,
    LABELS,
    MUSCLE_HU,
    SPINE_KNOTS,
    WAVE_MM,
    Canvas,
    curve,
    ellipsoid,
    smooth_max,
    tube,
)
from medssl.phantoms.emphysema import HOLE_HU, draw_severity, hole_share

VERSION = 1
"""Version of the drawing, raised whenever the same seed gives other voxels."""


def draw_wall(canvas: Canvas) -> None:
    """Draw table, skin, fat, muscle, and the contents of the trunk before there are organs."""
    x, _, z = canvas.point
    trunk, subject = canvas.trunk, canvas.subject
    every = np.arange(len(x))
    if subject.table:
        place = canvas.near((-400, -400, -400), (400, -60, 400))
        top = -150 - subject.fat_mm * 0.6 + canvas.point[0][place] ** 2 / 1400
        depth = canvas.point[1][place] - top
        edge = np.abs(canvas.point[0][place]) - 175
        canvas.paint(place, np.maximum(np.abs(depth + 12) - 12, edge), -880.0)
        canvas.paint(place, np.maximum(np.abs(np.abs(depth + 12) - 12) - 2, edge), -150.0)
    canvas.paint(every, trunk.beyond_skin_mm - 1.5, 5.0, "body")
    canvas.paint(every, trunk.beyond_skin_mm + 1.5, FAT_HU, "fat")
    grain = canvas.field(WAVE_MM / 2)
    septa = np.abs(canvas.field(WAVE_MM)) * 10 - 1.2  # sheets of fat between muscles
    canvas.paint(every, trunk.beyond_muscle_mm, MUSCLE_HU + 6 * grain, "muscle")
    between = np.flatnonzero((trunk.beyond_muscle_mm < -5) & (trunk.beyond_mm > 6))
    canvas.paint(between, septa[between], FAT_HU + 25, "fat")
    cavity = trunk.beyond_mm + 8 + 6 / (1 + np.exp((z + 110) / 12))
    chest = z > trunk.diaphragm_mm
    canvas.paint(every, cavity, np.where(chest, 15.0, FAT_HU - 5).astype(np.float32), "fat")
    canvas.label[(cavity < 0) & chest] = LABELS["body"]


def draw_abdomen(canvas: Canvas) -> None:
    """Draw bowel, stomach, liver with veins, gall bladder, spleen, kidneys, pancreas, psoas."""
    trunk, subject = canvas.trunk, canvas.subject
    place = canvas.near((-150, -110, -300), (150, 130, 60))
    point = canvas.point[:, place]
    x, y, z = point
    cavity = trunk.beyond_mm[place] + 10 + 5 / (1 + np.exp((z + 110) / 12))
    below = z - trunk.diaphragm_mm[place]
    canvas.paint(place, smooth_max(cavity - 2, np.abs(below - 1) - 2.5, 3.0), 45.0, "muscle")  # the diaphragm
    inside = smooth_max(cavity, below, 6.0)
    _draw_bowel(canvas, place, inside)
    side = np.array([[-1.0], [1.0], [1.0]], np.float32)
    pancreas = tube(point, [(32, 8, -112), (5, 22, -100), (-35, -2, -88), (-72, -22, -76)], (13, 10, 10, 8))
    canvas.paint(place, pancreas + 2.5 * canvas.field(16.0)[place], 0.6 * subject.liver_hu + 8, "body")

    stomach_at = np.array([-58, 28, -58]) + canvas.jitter(5)
    stomach = smooth_max(ellipsoid(point, stomach_at, (44, 38, 58), turn_deg=(15, 0, 20)), inside + 4, 10.0)
    stomach = np.minimum(
        stomach,
        smooth_max(tube(point, [(-50, 35, -100), (-10, 45, -118), (22, 32, -112)], (26, 20, 13)), inside + 4, 8),
    )
    canvas.paint(place, stomach, 45.0, "body")
    level = stomach_at[1] + canvas.rng.uniform(4, 22)
    canvas.paint(place, stomach + 5, np.where(y > level, GAS_HU, 18.0).astype(np.float32))

    visceral = ellipsoid(point, np.array([12, -42, -132]) + canvas.jitter(4), (66, 58, 76), turn_deg=(0, 25, 0))
    right = ellipsoid(
        point, np.array([62, 4, -62]) + canvas.jitter(4), np.array([92, 104, 96]) * canvas.rng.normal(1, 0.04)
    )
    left = ellipsoid(point, np.array([-6, 48, -42]) + canvas.jitter(5), (84, 44, 40), turn_deg=(0, -14, 0))
    lower = (z + 148 - canvas.rng.uniform(-15, 15)) * -0.9 - 0.42 * (x - 110) + 0.1 * y
    liver = smooth_max(smooth_max(np.minimum(smooth_max(right, lower, 25), left), inside, 8.0), -visceral, 16.0)
    liver = smooth_max(liver, -(stomach - 3), 6.0)
    canvas.paint(place, liver, subject.liver_hu + 3 * canvas.field(WAVE_MM)[place], "liver")
    veins = np.hypot(canvas.field(30.0)[place], canvas.field(30.0)[place]) * 17 - 3.2
    veins_hu = 38 + (subject.blood_hu - 45) * 1.05
    canvas.paint(place, smooth_max(veins, liver + 9, 3.0), veins_hu)
    gall = ellipsoid(point, np.array([46, 44, -104]) + canvas.jitter(4), (14, 18, 27), turn_deg=(30, 0, 0))
    canvas.paint(place, gall, 10.0, "body")

    spleen_at = np.array([-88, -40, -62]) + canvas.jitter(5)
    hilum = ellipsoid(point, spleen_at + np.array([53, 37, -2]), (42, 48, 60))
    spleen = ellipsoid(point, spleen_at, np.array([44, 52, 60]) * canvas.rng.normal(1, 0.08), turn_deg=(-20, 0, -20))
    spleen = smooth_max(smooth_max(spleen, inside, 8.0), -hilum, 10.0)
    canvas.paint(place, spleen, subject.spleen_hu + 3 * canvas.field(WAVE_MM)[place], "spleen")

    for sign, top in ((1, -136), (-1, -122)):
        centre = np.array([sign * 66, -48, top]) + canvas.jitter(4)
        mirrored = point if sign > 0 else point * side
        centre = centre if sign > 0 else centre * side[:, 0]
        kidney = ellipsoid(mirrored, centre, (27, 25, 55), turn_deg=(-8, 12, 35))
        hollow = ellipsoid(mirrored, centre + np.array([-25, 10, 0]), (18, 14, 22))
        kidney = smooth_max(kidney, -hollow, 6.0)
        pelvis = ellipsoid(mirrored, centre + np.array([-10, 4, 0]), (15, 10, 26))
        fat = ellipsoid(mirrored, centre, (40, 37, 70), turn_deg=(-8, 12, 35))
        canvas.paint(place, smooth_max(fat, inside + 2, 5.0), FAT_HU - 5, "fat")
        canvas.paint(place, smooth_max(kidney, inside + 3, 5.0), subject.cortex_hu, "kidneys")
        canvas.paint(place, smooth_max(kidney, inside + 3, 5.0) + 9, 0.72 * subject.cortex_hu + 8)
        canvas.paint(place, pelvis, -55.0)
        canvas.paint(place, pelvis + 6, 12.0)
    for sign in (1, -1):
        path = [(sign * 24, -46, -60), (sign * 33, -52, -130), (sign * 42, -48, -200), (sign * 48, -40, -260)]
        canvas.paint(place, tube(point, path, (6, 14, 21, 23)), MUSCLE_HU, "muscle")


def _draw_bowel(canvas: Canvas, place: Int[np.ndarray, " some"], inside: Float[np.ndarray, " some"]) -> None:
    subject, (x, y, z) = canvas.subject, canvas.point[:, place]
    loops = canvas.field(27.0)[place]
    region = np.maximum(np.maximum(inside + 6, z + 112 - 0.15 * x - 14 * canvas.field(45.0)[place]), -38 - y)
    canvas.paint(place, smooth_max(14 * (subject.visceral_fat - loops), region, 6.0), 38.0, "body")
    content = np.where(canvas.field(45.0)[place] > 0.9, GAS_HU, 18.0).astype(np.float32)
    canvas.paint(place, smooth_max(14 * (subject.visceral_fat + 0.55 - loops), region, 6.0), content)
    stool = canvas.field(12.0)[place]
    for path in (
        [(92, 10, -128), (94, 0, -160), (90, 2, -250)],
        [(90, 30, -132), (40, 66, -142), (-20, 68, -138), (-70, 46, -112), (-98, -6, -88)],
        [(-98, -6, -88), (-98, -28, -130), (-96, -22, -250)],
    ):
        bent = [np.array(p) + canvas.jitter(4) for p in path]
        colon = smooth_max(tube(canvas.point[:, place], bent, [19.0] * len(bent)) + 3 * stool, inside + 3, 5.0)
        canvas.paint(place, colon, 35.0, "body")
        canvas.paint(place, colon + 4.5, np.where(stool > -0.2, GAS_HU, -60.0).astype(np.float32))


def draw_chest(canvas: Canvas) -> None:
    """Draw lungs with vessels, mediastinum, airways, heart and great vessels, aorta."""
    trunk, subject = canvas.trunk, canvas.subject
    place = canvas.near((-150, -120, -130), (150, 120, 235))
    point = canvas.point[:, place]
    x, y, z = point
    heart_at = np.array([-22, 22, 44 + 0.5 * subject.breath_mm]) + canvas.jitter(3)
    heart = ellipsoid(point, heart_at, np.array([56, 49, 62]) * canvas.rng.normal(1, 0.05), turn_deg=(-35, -38, 25))
    heart = smooth_max(heart, trunk.diaphragm_mm[place] - z + 1, 10.0)
    waist = (
        24 + 9 / (1 + np.exp((z - 60) / 20)) + 7 * np.exp(-(((z - 140) / 40) ** 2)) + 3.5 * canvas.field(50.0)[place]
    )
    waist = waist - 0.22 * np.clip(y - 5, 0, None) - 0.08 * np.clip(-y - 25, 0, None)
    middle = np.minimum(np.abs(x + 3) - waist, heart - 5)
    apart = -middle
    above = trunk.diaphragm_mm[place] + 3 - z
    lung = smooth_max(smooth_max(trunk.beyond_mm[place] + 8, above, 10.0), apart, 9.0)
    dorsal = np.clip((-y - 20) / 80, -0.5, 1)
    texture = 16 * canvas.field(14.0)[place] + 22 * canvas.field(60.0)[place]
    canvas.paint(place, lung, (subject.lung_hu + 45 * dorsal + texture).astype(np.float32), "lungs")
    if canvas.emphysema_seed is not None:
        _draw_emphysema(canvas, canvas.emphysema_seed, place[lung < 0], lung[lung < 0])
    hilum = np.minimum(*(ellipsoid(point, (sign * 38, -14, 82), (1, 1, 1)) for sign in (1, -1)))
    wide = np.clip(6.4 - hilum / 26, 1.9, 6.4)
    for wave in (38.0, 27.0, 20.0):
        vessels = np.hypot(canvas.field(wave)[place], canvas.field(wave)[place]) * wave * 0.55 - wide * (wave / 38)
        canvas.paint(place, smooth_max(vessels, lung + 4, 2.0), np.float32(min(subject.blood_hu, 60.0)))

    fat = np.flatnonzero((middle < 0) & (lung > 2) & (z > trunk.diaphragm_mm[place]) & (trunk.beyond_mm[place] < -9))
    canvas.paint(place[fat], np.full(len(fat), -9.0), -70 + 25 * canvas.field(20.0)[place[fat]], "fat")
    canvas.paint(place, heart - 4, -85.0, "fat")
    _draw_heart(canvas, place, heart_at, heart)
    _draw_vessels(canvas)
    gullet = [(-2, -34, 235), (-4, -38, 130), (-10, -34, 60), (-22, -18, -10), (-40, 0, -30)]
    canvas.paint(place, tube(point, gullet, [8] * 5), 35.0, "body")
    for path, radius in (
        ([(0, -16, 240), (0, -22, 160), (2, -26, 108)], 9.5),
        ([(2, -26, 110), (30, -28, 86), (52, -32, 70)], 7.0),
        ([(2, -26, 110), (-32, -28, 82), (-54, -34, 66)], 6.5),
        ([(30, -28, 86), (58, -12, 96)], 4.0),
        ([(-32, -28, 82), (-58, -10, 92)], 4.0),
    ):
        airway = tube(point, path, [radius] * len(path))
        canvas.paint(place, airway - 2, 20.0, "body")
        canvas.paint(place, airway, -985.0)


def _draw_emphysema(
    canvas: Canvas, seed: int, place: Int[np.ndarray, " some"], lung: Float[np.ndarray, " some"]
) -> None:
    severity, spacing_mm = draw_severity(seed), canvas.spacing_mm
    share = hole_share(canvas.point[:, place], seed=seed, severity=severity, spacing_mm=spacing_mm)
    canvas.paint(place, np.maximum((0.5 - share) * spacing_mm, lung + 1), HOLE_HU)  # under a pleura of 1 mm


def _draw_heart(
    canvas: Canvas, place: Int[np.ndarray, " some"], at: Float[np.ndarray, "3"], heart: Float[np.ndarray, " some"]
) -> None:
    subject, point = canvas.subject, canvas.point[:, place]
    canvas.paint(place, heart, 48 + 0.35 * (subject.blood_hu - 45), "heart")
    chambers = (
        ((-18, 2, -12), (19, 17, 32), (-35, -38, 25)),  # left ventricle
        ((6, 24, -12), (26, 13, 30), (-35, -30, 25)),  # right ventricle
        ((30, -2, 2), (18, 20, 25), (0, 0, 0)),  # right atrium
        ((4, -28, 22), (29, 15, 20), (0, 0, 0)),  # left atrium
    )
    for offset, radii, turn in chambers:
        chamber = ellipsoid(point, at + np.array(offset), radii, turn_deg=turn)
        canvas.paint(place, smooth_max(chamber, heart + 5, 3.0), subject.blood_hu)


def _draw_vessels(canvas: Canvas) -> None:
    """Draw the aorta, caval veins, pulmonary trunk and the branches of the arch."""
    subject, spine = (
        canvas.subject,
        curve(np.array([100.0, 40.0, -20.0, -100.0, -180.0, -260.0]), *SPINE_KNOTS).tolist(),
    )
    place = canvas.near((-60, -75, -300), (70, 60, 240))
    point = canvas.point[:, place]
    lift = canvas.rng.uniform(-6, 6)
    veins = (
        ([(26, 8, 150), (27, 4, 100), (26, 8, 55)], (9, 10, 11)),  # superior caval vein
        ([(22, -8, 20), (24, -10, -30), (24, -20, -110), (22, -24, -260)], (12, 12, 11, 10)),  # inferior
        ([(24, 6, 148), (-30, 24, 158)], (7, 6)),
        ([(-14, 32, 66), (-18, 14, 94), (-20, -4, 98)], (13, 13, 12)),  # pulmonary trunk
        ([(-20, 0, 98), (-44, -16, 90)], (11, 8)),
        ([(-18, -2, 96), (20, -8, 90), (46, -14, 82)], (11, 9, 7)),
        ([(8, 2, 140), (16, -6, 240)], (6, 5)),
        ([(-16, -22, 140), (-20, -18, 240)], (5, 5)),
    )
    for path, radii in veins:
        canvas.paint(place, tube(point, path, radii), 40 + 0.92 * (subject.blood_hu - 45), "body")
    arch: list[Sequence[float]] = [
        (4, 14, 66),
        (12, 20, 96),
        (8, 10, 122 + lift),
        (-6, -10, 130 + lift),
        (-18, -32, 118),
        (-24, spine[0] + 34, 100),
    ]
    descent: list[Sequence[float]] = [
        (-24, spine[1] + 30, 40),
        (-20, spine[2] + 29, -20),
        (-10, spine[3] + 29, -100),
        (-6, spine[4] + 29, -180),
        (-4, spine[5] + 28, -260),
    ]
    aortic = (15, 15, 14, 13, 12.5, 12, 12, 11.5, 10.5, 9.5, 9)
    canvas.paint(place, tube(point, arch + descent, aortic), subject.blood_hu, "aorta")
    for path in (
        [(-6, -18, -122), (30, -30, -128), (48, -44, -134)],
        [(-6, -18, -116), (-30, -30, -118), (-48, -44, -122)],
    ):
        canvas.paint(place, tube(point, path, (4, 4, 3)), subject.blood_hu, "body")


def draw_skeleton(canvas: Canvas) -> None:
    """Draw vertebrae with canal and processes, ribs, costal cartilage, sternum, shoulder blades."""
    _draw_spine(canvas)
    _draw_ribs(canvas)


def _level(z: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the vertebra's number at a height, from the first thoracic one down; centres are whole numbers."""
    return curve(z, (-260, 16.2), (-180, 13.9), (-90, 11.0), (0, 7.5), (100, 3.3), (195, -1.0), (240, -3.2))


def _draw_spine(canvas: Canvas) -> None:
    subject, trunk = canvas.subject, canvas.trunk
    place = canvas.near((-62, -160, -300), (62, 0, 260))
    x, _, z = canvas.point[:, place]
    back = canvas.point[1][place] - trunk.spine_mm[place]
    level = _level(z)
    pitch = -1 / np.gradient(_level(np.linspace(-260, 240, 101)), np.linspace(-260, 240, 101))
    height = np.interp(z, np.linspace(-260, 240, 101), pitch).astype(np.float32)  # mm per vertebra
    off = (level - np.round(level)) * -height  # mm above the centre of the nearest vertebra
    lumbar = 1 / (1 + np.exp((z + 100) / 25))
    rx, ry = 16.5 + 8 * lumbar, 14.5 + 3.5 * lumbar
    round_body = (np.sqrt((x / rx) ** 2 + (np.where(back < 0, back * 1.12, back) / ry) ** 2) - 1) * ry
    waist = round_body + 2.2 * np.cos(np.pi * np.clip(off / (0.42 * height), -1, 1)) * 0.5
    canvas.paint(place, np.maximum(round_body + 1, 0), 85.0, "spine")  # discs
    body = smooth_max(waist, np.abs(off) - 0.40 * height, 3.0)
    bone = subject.bone_hu
    canvas.paint(place, body, bone + 260, "spine")
    canvas.paint(place, body + 3.5, bone + 25 * canvas.field(12.0)[place])
    arch_y, canal = back + 23 + 2 * lumbar, 8.5 + lumbar
    ring = np.hypot(x / 1.15, arch_y)
    lamina = smooth_max(np.abs(ring - canal - 3.5) - 3.2, np.abs(off - 2) - 0.36 * height, 3.0)
    sloped = off + 0.55 * (1 - lumbar) * (-arch_y - 10) + 2
    spinous = np.maximum(
        np.maximum(np.abs(x) - 3.2, np.abs(sloped) - (5 + 4 * lumbar)),
        np.maximum(arch_y + 9, -arch_y - 40 + 4 * lumbar),
    )
    reach = 34 + 8 * lumbar
    swept = arch_y - 2 + 0.22 * (np.abs(x) - 14)
    transverse = np.maximum(
        np.maximum(np.abs(swept) - 4, np.abs(off - 3) - 5), np.maximum(8 - np.abs(x), np.abs(x) - reach)
    )
    for part, hu in ((transverse, bone + 130), (spinous, bone + 150), (lamina, bone + 260)):
        canvas.paint(place, part, hu, "spine")
    canvas.paint(place, ring - canal, 22.0, "spine")
    canvas.paint(place, ring - 5.2, 42.0)


def _draw_ribs(canvas: Canvas) -> None:
    subject, trunk = canvas.subject, canvas.trunk
    some = np.flatnonzero((np.abs(trunk.beyond_mm) < 26) & (canvas.point[2] > -200))
    x, y, z = canvas.point[:, some]
    angle, beyond = trunk.angle[some], trunk.beyond_mm[some]
    fall = 78 * (1 - np.cos(np.clip(angle, 0, 2.35))) / 1.7 * np.clip(1.15 - 0.0022 * (z + 40), 0.55, 1.2)
    rise = 42 * np.clip(angle - 2.3, 0, None) ** 1.3  # cartilage climbs to the breastbone
    head = z + fall - rise - 4
    number = _level(head)
    pitch = 25.0
    off = (number - np.round(number)) * pitch
    rib = np.clip(np.round(number), 0, 11)
    real = (np.round(number) >= 0) & (np.round(number) <= 11)
    ends = np.array([2.75, 2.75, 2.7, 2.7, 2.7, 2.7, 2.75, 2.5, 2.35, 2.15, 1.55, 1.05])[rib.astype(int)]
    bony = np.array([2.5, 2.45, 2.4, 2.35, 2.3, 2.25, 2.15, 2.1, 2.05, 2.0, 1.5, 1.0])[rib.astype(int)]
    tilt = np.hypot(off / 1.75, beyond + 3) - 3.9
    radius = np.hypot(x, y)
    shaft = np.where(real, np.maximum(tilt, np.maximum((angle - ends), (0.22 - angle)) * radius), 99.0)
    hard = np.clip((bony - angle) * radius / 8, 0, 1)
    canvas.paint(some, shaft, 95 + hard * (subject.bone_hu + 240 - 95), "ribs")
    canvas.paint(some, shaft + 3.2, 95 + hard * (subject.bone_hu + 40 - 95))
    front = np.pi - angle
    sternum = smooth_max(np.abs(beyond + 1) - 6, np.abs(x) - 15 - 11 / (1 + np.exp((112 - z) / 6)), 3.0)
    sternum = smooth_max(np.maximum(sternum, np.where(front < 0.8, -9, 99)), np.abs(z - 66) - 80, 6.0)
    canvas.paint(some, sternum, subject.bone_hu + 90, "ribs")
    canvas.paint(some, sternum + 4, subject.bone_hu - 60)
    blade = np.maximum(np.abs(beyond - 15) - 2.6, np.abs(angle - 1.02) * 100 - np.clip((z - 38) * 0.52, 0, 58))
    blade = np.maximum(blade, z - 168)
    canvas.paint(some, blade, subject.bone_hu + 180, "body")


PARTS: tuple[Callable[[Canvas], None], ...] = (draw_wall, draw_chest, draw_abdomen, draw_skeleton)
"""The parts in painting order: a later one covers an earlier one."""


def draw_phantom(
    seed: int, *, size_voxel: Sequence[int] = (96, 96, 96), spacing_mm: float = 4.0, emphysema: bool = False
) -> tuple[Volume, Int16[np.ndarray, "x y z"]]:
    """Draw one torso CT in HU (int16) and its label map (`LABELS`), the same for the same arguments.

    Size, pose, shape, fat, breath, contrast phase, noise and table vary with the seed. The field of view follows from
    `size_voxel` and `spacing_mm` and lies about the middle of the trunk: 384 mm reach from the tips of the
    lungs to below the kidneys. The same field at another spacing shows the same subject. With `emphysema` the lungs
    have holes according to `draw_severity` of the seed, and nothing else differs.
    """
    canvas = Canvas(size_voxel, spacing_mm, np.random.default_rng(seed), emphysema_seed=seed if emphysema else None)
    for draw in PARTS:
        draw(canvas)
    hu = canvas.hu.reshape(canvas.size)
    noise = canvas.rng.standard_normal(canvas.size, dtype=np.float32)
    for axis in range(2):  # reconstruction correlates noise in the plane
        noise = 0.8 * noise + 0.45 * np.roll(noise, 1, axis) + 0.4 * np.roll(noise, -1, axis)
    hu = np.clip(np.rint(hu + canvas.subject.noise_hu * noise), -1024, 3071).astype(np.int16)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) / 2 * spacing_mm for n in canvas.size]
    return Volume(hu[None], affine, f"phantom, seed {seed}"), canvas.label.reshape(canvas.size).astype(np.int16)
