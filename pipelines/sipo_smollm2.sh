#!/usr/bin/env bash
# SIPO on SmolLM2 without a GPU: the model's own answers to HH-RLHF's prompts, labelled by the embedded rewards, whose conflicts its two
# policies resolve themselves.
# usage:    [HH=FOLDER] pipelines/sipo_smollm2.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
# takes:    about 80 minutes of a core: answers 10, two policies 25, then reviews and rewrites 22, scores 12, re-alignment 2
# expect:   OUT/sipo/selected/summary.json: accept rates, gains and lengths by stage, the embedded judges held out: 6 of 144 candidates
#           accepted, for 3 of 48 conflicts, and no rewrite;
#           OUT/sipo/compare/report.html: MOD of the first policies beside MOD of the re-aligned ones, on prompts of no training pair.
#           On HH's own pairs instead (human-written answers, 32 conflicts) 1 of 96 candidates was accepted: the policies' samples are 0.7 and
#           0.3 sd below both answers in the policies' own view, and the reviews of 135M parameters don't mend that.
source "$(dirname "$0")/common.sh"
source "$here/own_answers.bash"
if [ -n "$tiny" ]; then
  held_out='[brief]' points=(--limit 4 --n_boot 50 --examples 1)
else
  held_out='[helpful,harmless,judge_helpful,judge_harmless]' points=(--limit 40)
fi

policies
sipo '["0.75,0.25","0.5,0.5","0.25,0.75"]' '["0.5,0.5"]'
after=$(each sipo/ /adapter)
run compare --out "$out/sipo/compare" "${asked[@]}" --split test "${points[@]}" --steps 2 \
  --methods "{MOD: {mixing: $tuned}, SIPO: {mixing: $after}}" \
  --rewards "$rewards" --judges "$judges" --samples 1 --reference_samples 4 --best_of '[2,4]' "${sampling[@]}"
