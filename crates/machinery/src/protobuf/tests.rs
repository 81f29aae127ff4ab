use super::*;

#[path = "vectors.rs"]
mod vectors;

use proptest::prelude::*;

#[test]
fn the_tables_are_whole() {
    let mut fields = 0;
    for (group, table) in tables::TABLES {
        for line in table.lines().filter(|l| !l.is_empty()) {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap();
            for word in words {
                let (_, field) = field(word).unwrap_or_else(|| panic!("{group} {name}: {word}"));
                if let Kind::Message(target) = &field.kind {
                    assert!(message(group, target).is_some(), "{group} {name}: {word}");
                }
                fields += 1;
            }
            assert!(MESSAGES[group].contains_key(name));
        }
    }
    assert_eq!(
        fields,
        MESSAGES.values().flat_map(|m| m.values()).map(BTreeMap::len).sum::<usize>(),
        "two fields of one number"
    );
}

#[test]
fn bodies_of_kubectl_mean_what_they_say() {
    for (body, object) in vectors::VECTORS {
        let body = base64::engine::general_purpose::STANDARD.decode(body).unwrap();
        let wanted: Value = serde_json::from_str(object).unwrap();
        assert_eq!(decode_body(&body).unwrap(), wanted);
    }
}

#[test]
fn fields_that_nobody_here_knows_are_refused_by_number() {
    // ConfigMap with a field 9.
    let status = decode_body(b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x02\x48\x01").unwrap_err();
    assert_eq!(status.code, 400);
    assert!(status.message.contains("field 9 of ConfigMap"), "{}", status.message);
}

#[test]
fn times_are_written_as_go_writes_them() {
    assert_eq!(time(b"", 0), Ok(None));
    assert_eq!(time(b"\x08\x01\x10\x98\x8c\xeb\xdc\x03", 6), Ok(Some(json!("1970-01-01T00:00:01.999999Z"))));
    assert_eq!(time(b"\x08\x00", 0), Ok(Some(json!("1970-01-01T00:00:00Z"))));
    assert_eq!(time(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 0), Err(Malformed::Time));
}

#[test]
fn unknown_kinds_are_named() {
    // Unknown{typeMeta: {apiVersion: "apps/v1", kind: "Deployment"}}
    let body = b"k8s\0\x0a\x15\x0a\x07apps/v1\x12\x0aDeployment";
    let status = decode_body(body).unwrap_err();
    assert_eq!(status.code, 415);
    assert!(status.message.contains("apps/v1 Deployment"), "{}", status.message);
}

#[test]
fn what_is_not_protobuf_is_said_to_be_none() {
    for body in [&b"{}"[..], b"", b"k8s\0\xff", b"k8s\0\x0a\x7f"] {
        let status = decode_body(body).unwrap_err();
        assert!(status.code == 400 || status.code == 415, "{}", status.message);
    }
}

proptest! {
    #[test]
    fn any_bytes(body in any::<Vec<u8>>()) {
        let _ = decode_body(&body);
    }

    #[test]
    fn any_bytes_as_each_kind(raw in any::<Vec<u8>>(), pick in any::<prop::sample::Index>()) {
        let all: Vec<_> = MESSAGES.iter().flat_map(|(group, m)| m.keys().map(move |kind| (*group, *kind))).collect();
        let (group, kind) = all[pick.index(all.len())];
        let mut meta = Vec::new();
        for (tag, text) in [(0x0a, group), (0x12, kind)] {
            meta.extend([tag, text.len() as u8]);
            meta.extend(text.as_bytes());
        }
        let mut body = b"k8s\0\x0a".to_vec();
        body.push(meta.len() as u8);
        body.extend(meta);
        if raw.len() < 128 {
            body.extend([0x12, raw.len() as u8]);
            body.extend(&raw);
        }
        let _ = decode_body(&body);
    }
}
