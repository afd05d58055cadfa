#!/usr/bin/env bash
# SIPO on SmolLM2 without a GPU: the model's own answers to HH-RLHF's prompts, labelled by the embedded rewards, whose conflicts its two
# policies resolve themselves.
# usage:    [HH=FOLDER] pipelines/sipo_smollm2.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
#           prompts, bank, pairs and the first two policies are those of pipelines/preferences.sh, taken over where OUT is the same
# takes:    beyond preferences.sh's stages about 40 minutes on a busy core: reviews and rewrites 22, scores 12, re-alignment 2
# expect:   OUT/sipo/selected/summary.json: accept rates, gains and lengths by stage, the embedded judges held out: 6 of 144 candidates
#           accepted, for 3 of 48 conflicts, and no rewrite;
#           OUT/sipo/compare/report.html: MOD of the first policies beside MOD of the re-aligned ones, on prompts of no training pair.
#           On HH's own pairs instead (human-written answers, 32 conflicts) 1 of 96 candidates was accepted: the policies' samples are 0.7 and
#           0.3 sd below both answers in the policies' own view, and the reviews of 135M parameters don't mend that.
source "$(dirname "$0")/common.sh"
source "$here/own_answers.bash"
weights='["0.75,0.25","0.5,0.5","0.25,0.75"]'
if [ -n "$tiny" ]; then
  limit=5 again=(--dpo.test_share 0.5 --dpo.fit.learning_rate 1e-3) select=(--margin -9) held_out='[brief]'
  refine=(--reviewing.max_new_tokens 8 --rewriting.max_new_tokens 8) points=(--limit 4 --n_boot 50 --examples 1)
else
  limit=48 again=(--dpo.test_share 0.1 --dpo.fit.learning_rate 5e-5) select=() held_out='[helpful,harmless,judge_helpful,judge_harmless]'
  refine=(--reviewing.max_new_tokens 48 --rewriting.max_new_tokens 40) points=(--limit 40)
fi
after="[$first=$out/sipo/$first/adapter,$second=$out/sipo/$second/adapter]"

policies
run sipo sample --out "$out/sipo/samples" --model "$model" --pairs "$pairs" --limit "$limit" --mixing "$tuned" --weights "$weights" \
  "${sampling[@]}" --sampling.greedy true
run sipo refine --out "$out/sipo/refined" --samples "$out/sipo/samples" --one_shot false --review_weights "$first=1" "${refine[@]}"
run sipo score --out "$out/sipo/scores" --samples "$out/sipo/samples" --refined "$out/sipo/refined" --policies "$tuned" \
  --soups '["0.5,0.5"]' --held_out "$held_out"
run sipo select --out "$out/sipo/selected" --scores "$out/sipo/scores" --unfinished keep --replay 0.5 --replay_pairs "$pairs" "${select[@]}"
for name in "${objectives[@]}"; do
  run train dpo --model "$out/$name/adapter" --pairs "[labelled:$out/sipo/selected/pairs.jsonl]" --dpo.objectives "[$name]" \
    "${dpo[@]}" --dpo.nll 0.1 --dpo.fit.checkpoint_every 6 "${again[@]}" --out "$out/sipo/$name"
done
run compare --out "$out/sipo/compare" --model "$model" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" --steps 2 \
  --methods "{MOD: {mixing: $tuned}, SIPO: {mixing: $after}}" \
  --rewards "$rewards" --judges "$judges" --samples 1 --reference_samples 4 --best_of '[2,4]' "${sampling[@]}"
