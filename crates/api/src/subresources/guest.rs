//! What the guest agent says, as KubeVirt tells it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The agent's answers by command (QEMU `docs/interop/qemu-ga-ref`); what it does not know is missing.
pub type Answers = BTreeMap<String, Value>;

/// The answer to `guestosinfo`, `userlist` or `filesystemlist`; none to anything else.
pub fn answer(action: &str, answers: &Answers) -> Option<Value> {
    match action {
        "guestosinfo" => Some(os_info(answers)),
        "userlist" => Some(json!({"metadata": {}, "items": users(answers)})),
        "filesystemlist" => Some(json!({"metadata": {}, "items": filesystems(answers)})),
        _ => None,
    }
}

/// KubeVirt's `VirtualMachineInstanceGuestAgentInfo`.
fn os_info(answers: &Answers) -> Value {
    let text = |command: &str, field: &str| answers.get(command).and_then(|answer| answer.get(field)).cloned();
    let mut os = Map::new();
    for (ours, theirs) in [
        ("name", "name"),
        ("kernelRelease", "kernel-release"),
        ("version", "version"),
        ("prettyName", "pretty-name"),
        ("versionId", "version-id"),
        ("kernelVersion", "kernel-version"),
        ("machine", "machine"),
        ("id", "id"),
    ] {
        set(&mut os, ours, text("guest-get-osinfo", theirs));
    }
    let mut info = Map::new();
    set(&mut info, "guestAgentVersion", text("guest-info", "version"));
    set(&mut info, "hostname", text("guest-get-host-name", "host-name"));
    let zone = answers.get("guest-get-timezone").map(|zone| {
        let name = zone.get("zone").and_then(Value::as_str).unwrap_or_default();
        json!(format!("{name}, {}", zone.get("offset").and_then(Value::as_i64).unwrap_or_default()))
    });
    set(&mut info, "timezone", zone);
    set(&mut info, "fsFreezeStatus", answers.get("guest-fsfreeze-status").cloned());
    info.insert("os".to_owned(), Value::Object(os));
    info.insert("userList".to_owned(), json!(users(answers)));
    info.insert("fsInfo".to_owned(), json!({"disks": filesystems(answers)}));
    let commands = list(answers.get("guest-info").and_then(|info| info.get("supported_commands")));
    let commands: Vec<Value> =
        commands.iter().map(|one| json!({"name": one.get("name"), "enabled": one.get("enabled")})).collect();
    info.insert("supportedCommands".to_owned(), json!(commands));
    Value::Object(info)
}

fn users(answers: &Answers) -> Vec<Value> {
    let user = |one: &Value| {
        let mut user = Map::new();
        set(&mut user, "userName", one.get("user").cloned());
        set(&mut user, "domain", one.get("domain").cloned());
        set(&mut user, "loginTime", one.get("login-time").cloned());
        Value::Object(user)
    };
    list(answers.get("guest-get-users")).iter().map(user).collect()
}

fn filesystems(answers: &Answers) -> Vec<Value> {
    let disk = |one: &Value| {
        let mut disk = Map::new();
        set(&mut disk, "serial", one.get("serial").cloned());
        set(&mut disk, "busType", one.get("bus-type").cloned());
        Value::Object(disk)
    };
    let filesystem = |one: &Value| {
        let mut filesystem = Map::new();
        set(&mut filesystem, "diskName", one.get("name").cloned());
        set(&mut filesystem, "mountPoint", one.get("mountpoint").cloned());
        set(&mut filesystem, "fileSystemType", one.get("type").cloned());
        filesystem.insert("usedBytes".to_owned(), one.get("used-bytes").cloned().unwrap_or(json!(0)));
        filesystem.insert("totalBytes".to_owned(), one.get("total-bytes").cloned().unwrap_or(json!(0)));
        let disks: Vec<Value> = list(one.get("disk")).iter().map(disk).collect();
        filesystem.insert("disk".to_owned(), json!(disks));
        Value::Object(filesystem)
    };
    list(answers.get("guest-get-fsinfo")).iter().map(filesystem).collect()
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn set(map: &mut Map<String, Value>, key: &str, value: Option<Value>) {
    if let Some(value) = value.filter(|value| !value.is_null()) {
        map.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_words_become_kubevirts() {
        let answers: Answers = serde_json::from_value(json!({
            "guest-info": {"version": "7.2.0", "supported_commands": [
                {"name": "guest-ping", "enabled": true, "success-response": true}]},
            "guest-get-host-name": {"host-name": "flyer"},
            "guest-get-osinfo": {"id": "debian", "pretty-name": "Debian 12", "kernel-release": "6.1"},
            "guest-get-timezone": {"zone": "UTC", "offset": 0},
            "guest-get-users": [{"user": "root", "login-time": 12.5}],
            "guest-get-fsinfo": [{"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 5, "total-bytes": 9,
                "disk": [{"serial": "S", "bus-type": "virtio", "bus": 0}]}],
            "guest-fsfreeze-status": "thawed",
        }))
        .unwrap();
        let users = json!([{"userName": "root", "loginTime": 12.5}]);
        let disks = json!([{"diskName": "vda1", "mountPoint": "/", "fileSystemType": "ext4", "usedBytes": 5,
            "totalBytes": 9, "disk": [{"serial": "S", "busType": "virtio"}]}]);
        assert_eq!(
            answer("guestosinfo", &answers).unwrap(),
            json!({
                "guestAgentVersion": "7.2.0", "hostname": "flyer", "timezone": "UTC, 0", "fsFreezeStatus": "thawed",
                "os": {"id": "debian", "prettyName": "Debian 12", "kernelRelease": "6.1"},
                "userList": users, "fsInfo": {"disks": disks},
                "supportedCommands": [{"name": "guest-ping", "enabled": true}],
            })
        );
        assert_eq!(answer("userlist", &answers).unwrap()["items"], users);
        assert_eq!(answer("filesystemlist", &answers).unwrap()["items"], disks);
        assert_eq!(answer("console", &answers), None);
        let nothing = answer("guestosinfo", &Answers::new()).unwrap();
        assert_eq!(nothing["supportedCommands"], json!([]));
    }
}
