#!/usr/bin/env bash
# SIPO (arXiv 2502.14354) on BeaverTails' comparisons (PKU-SafeRLHF-10K): helpful against harmless.
# usage:    pipelines/sipo_beavertails.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  PKU-Alignment/alpaca-7b-reproduced, PKU-SafeRLHF-10K, beaver-7b-v1.0-reward and -cost (about 45 GB)
# needs:    a GPU of 80 GB; not run here. Two trainings of about 13,500 steps of batch 2 and two of at most 7,500, 10,000 samples of
#           at most 384 tokens, seven passes over 15,000 responses
# expect:   OUT/selected/summary.json (accept rates, gains, lengths) and OUT/compare/report.html with the fronts before and after;
#           the paper's tables could not be read, so none of its numbers stand here
# as there: the natural mix of conflicts, 2,500 of them improved, greedy MOD at weights .8 to .2, no review on this data set, two
#           implicit rewards and four soups filter without a margin, their mean chooses, DPO + 0.1 NLL at 5e-6 from each policy
# not as in the released code: soups are exact sums of updates, and re-aligned adapters are laid on the first ones, so that nothing is
#           merged in bf16; the NLL is per response token and not per padded row; the rate warms up over a tenth of the steps;
#           capped responses are left out; the test prompts are of no training pair and don't move with the hash seed
source "$(dirname "$0")/common.sh"
weights='["0.8,0.2","0.6,0.4","0.4,0.6","0.2,0.8"]'
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model data=saferlhf:$out/tiny/saferlhf.jsonl shares='{train: 0.7, test: 0.3}' limit=6
  dpo=(--dpo.lora.rank 2 --dpo.max_length 128 --dpo.test_share 0.5 --dpo.fit.batch_size 4 --dpo.fit.max_steps 3)
  first=(--dpo.fit.learning_rate 1e-2) again=(--dpo.fit.learning_rate 1e-3)
  drawn=(--sampling.max_new_tokens 8) select=(--margin -9 --unfinished keep)
  rewards='[helpful=long,harmless=readable]' held_out='[brief]' points=(--limit 4 --steps 2 --n_boot 50 --examples 1)
else
  base=$out/base data=saferlhf:PKU-Alignment/PKU-SafeRLHF-10K shares='{train: 0.95, test: 0.05}' limit=2500
  fetch "$base" PKU-Alignment/alpaca-7b-reproduced
  dpo=(--dpo.lora.rank 64 --dpo.lora.alpha 1 --dpo.lora.targets '[q_proj,k_proj,v_proj,o_proj]' --dpo.beta 0.1 --dpo.max_length 512
    --dpo.test_share 0.1 --dpo.fit.batch_size 2 --dpo.fit.epochs 3 --dpo.fit.weight_decay 0.05 --dpo.fit.warmup 0.1
    --dpo.fit.precision bfloat16 --dpo.fit.checkpoint_every 500 --dpo.licence 'CC BY-NC 4.0 (PKU-SafeRLHF)')
  first=(--dpo.fit.learning_rate 5e-4) again=(--dpo.fit.learning_rate 5e-6)
  drawn=(--sampling.max_new_tokens 384 --sampling.top_k 0) select=()
  rewards='[helpful=field:beaver_reward,harmless=field:beaver_cost]' held_out=$rewards points=(--limit 500 --steps 5)
fi
before="[helpful=$out/helpful/adapter,harmless=$out/harmless/adapter]"
after="[helpful=$out/helpful-again/adapter,harmless=$out/harmless-again/adapter]"
greedy=(--sampling.greedy true --sampling.whole_sentences false "${drawn[@]}")

run pairs --out "$out/pairs" --sources "[$data]" --shares "$shares"
for name in helpful harmless; do
  run train dpo --out "$out/$name" --model "$base" --pairs "[labelled:$out/pairs/train.jsonl]" --dpo.objectives "[$name]" \
    "${dpo[@]}" "${first[@]}"
done
run sipo sample --out "$out/samples" --model "$base" --pairs "[labelled:$out/pairs/train.jsonl]" --limit "$limit" \
  --mixing "$before" --weights "$weights" "${greedy[@]}"
run sipo score --out "$out/scores" --samples "$out/samples" --policies "$before" --soups "$weights" --held_out "$held_out"
run sipo select --out "$out/selected" --scores "$out/scores" "${select[@]}"
for name in helpful harmless; do
  run train dpo --out "$out/$name-again" --model "$out/$name/adapter" --pairs "[labelled:$out/selected/pairs.jsonl]" \
    --dpo.objectives "[$name]" --dpo.nll 0.1 "${dpo[@]}" "${again[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$out/pairs/prompts.jsonl" --split test "${points[@]}" \
  --methods "{MOD: {mixing: $before}, SIPO: {mixing: $after}, soup: {soup: $before}, SIPO-soup: {soup: $after}}" \
  --rewards "$rewards" --judges '[]' --samples 1 --reference_samples 1 --best_of '[]' "${greedy[@]}"
