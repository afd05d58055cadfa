# Sourced by the pipelines of Rewards-in-Context, which differ in data, rewards and lengths: the offline training, two online rounds, the
# comparison. Reads: base, pairs (scored, learnt), asked and held (prompts), split, rewards, rounds, points, drawn, ric, offline, online.
run score --run "$out/offline" --pairs "[$pairs]" --model "$base" --rewards "$rewards"
run normalise --run "$out/offline" --out "$out/scale.json"
run train ric --out "$out/ric0" --runs "[$out/offline]" --model "$base" --normalisation "$out/scale.json" "${offline[@]}"
learnt=''
for round in 1 2; do
  before=$out/ric$((round - 1))
  run sample --out "$out/round$round" --model "$base" --in_context "$before" --goals released --prompts "$asked" --split '' --samples 1 \
    --seed "$round" "${rounds[@]}" "${drawn[@]}"
  run score --run "$out/round$round" --model "$base" --rewards "$rewards"
  learnt=$learnt${learnt:+,}$out/round$round
  run train ric --out "$out/ric$round" --runs "[$learnt]" --replay "[$out/offline]" --model "$before/adapter" \
    --normalisation "$out/scale.json" --ric.selection.by any_quantile "${online[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$held" --split '' "${points[@]}" --rewards "$rewards" --judges '[]' \
  --methods "{RiC: {in_context: $out/ric2}, RiC-released: {in_context: $out/ric2, targets: 'lp:2', span: released, share: 0}, \
offline: {in_context: $out/ric0}}" --samples 1 --reference_samples 1 --best_of '[]' "${drawn[@]}"
