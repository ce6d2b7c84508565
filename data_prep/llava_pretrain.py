"""LLaVA-Pretrain (arXiv 2304.08485): 558,128 images of LAION, CC3M and SBU with BLIP captions as answers to a request.

    python data_prep/llava_pretrain.py source=blip_laion_cc_sbu_558k.json images=LLaVA-Pretrain out=s3://corpora/llava

``source`` is the JSON list of liuhaotian/LLaVA-Pretrain (181 MB); ``images`` holds its unpacked images.zip (27 GB)
under the records' names (00453/004539375.jpg). Its users must keep to the licences of CC3M and BLIP (as its page says;
check); the images belong to their owners.
"""

import sys

from hpc_mm import prepare
from hpc_mm.chats import Chats, arrange, urls

if __name__ == "__main__":
    sys.exit(prepare.main(Chats, urls, arrange))
